"""Finds the longest functions below a folder, as an agent that speaks the JSON-lines protocol.

Tells a message for each file that it has read, what it used, and at the end its result.
"""

import ast
import json
import sys
from pathlib import Path

from repository import files


def tell(**line: object) -> None:
    print(json.dumps(line), flush=True)


folder = Path(sys.argv[1])
lengths: list[tuple[int, str]] = []
for path in files(folder, ".py"):
    tree = ast.parse(path.read_bytes(), path)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths += [((node.end_lineno or node.lineno) - node.lineno + 1, f"{path}:{node.name}") for node in functions]
    tell(type="usage", requests=1)
    tell(type="message", role="assistant", content=f"{path}: {len(functions)} functions")
longest = [{"function": name, "lines": length} for length, name in sorted(lengths, reverse=True)[:5]]
tell(type="result", output={"functions": len(lengths), "longest": longest})
