"""Prints what a Python file says that it is for: the first line of its docstring."""

import ast
import sys
from pathlib import Path

docstring = ast.get_docstring(ast.parse(Path(sys.argv[1]).read_bytes()))
if not docstring:
    sys.exit(f"{sys.argv[1]} does not say what it is for")
print(docstring.splitlines()[0])
