"""Finds notes to oneself, such as TODO, in comments of Python files."""

import re
import sys
import tokenize
from pathlib import Path

from repository import files

MARKER = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")

found = 0
for path in files(Path(sys.argv[1]), ".py"):
    with tokenize.open(path) as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type == tokenize.COMMENT and MARKER.search(token.string):
                found += 1
                print(f"{path}:{token.start[0]}: {token.string}")
print(f"{found} notes found")
