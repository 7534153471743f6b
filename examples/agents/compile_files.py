"""Compiles every Python file below a folder, and fails if one does not compile."""

import sys
from pathlib import Path

from repository import files

broken = []
count = 0
for path in files(Path(sys.argv[1]), ".py"):
    count += 1
    try:
        compile(path.read_bytes(), path, "exec")
    except SyntaxError as error:
        broken.append(f"{path}:{error.lineno}: {error.msg}")
if broken:
    sys.exit("\n".join(broken))
print(f"{count} files compile")
