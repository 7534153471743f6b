"""Runs the quickstart, and writes its report to docs/run.json: what the picture on the first page is drawn from.

Run ``python docs/record_run.py`` when the example or the report has changed. Outputs are cut, as the picture shows
little of them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
OUTPUT_CHARACTERS = 80


def cut(value: Any) -> Any:
    """Return a part of the report with long texts cut."""
    if isinstance(value, dict):
        return {key: cut(item) for key, item in value.items()}
    if isinstance(value, list):
        return [cut(item) for item in value]
    return value[:OUTPUT_CHARACTERS] if isinstance(value, str) else value


def main() -> None:
    """Run, cut and write."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "parallel_agents", "run", "examples/quickstart.toml", "--report", str(report)]
        subprocess.run(command, cwd=DOCS.parent, check=False)  # ends with 1, as two agents fail on purpose
        read = json.loads(report.read_text("utf-8"))
    del read["meta"]
    (DOCS / "run.json").write_text(json.dumps(cut(read), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
