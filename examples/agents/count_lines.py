"""Counts the lines of the files below a folder, by suffix."""

import json
import sys
from collections import Counter
from pathlib import Path

from repository import files

folder = Path(sys.argv[1])
if not folder.is_dir():
    sys.exit(f"there is no folder {folder}")
lines: Counter[str] = Counter()
for path in files(folder):
    lines[path.suffix or path.name] += path.read_bytes().count(b"\n")
print(json.dumps(dict(lines.most_common())))
