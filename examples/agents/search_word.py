"""Finds the lines in which a word occurs, as a whole word."""

import re
import sys
from pathlib import Path

from repository import files

folder, word = Path(sys.argv[1]), sys.argv[2]
wanted = re.compile(rf"\b{re.escape(word)}\b")
for path in files(folder):
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1):
        if wanted.search(line):
            print(f"{path}:{number}: {line.strip()}")
