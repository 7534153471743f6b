"""Writes the SHA-256 of every file below a folder, and one over all of them."""

import hashlib
import sys
from pathlib import Path

from repository import files

folder = Path(sys.argv[1])
of_all = hashlib.sha256()
for path in files(folder):
    line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}"
    of_all.update(line.encode() + b"\n")
    print(line)
print(f"{of_all.hexdigest()}  all of them")
