"""What runs on many machines cost per assignment: ``python benchmarks/cluster.py [PART ...]``, all parts unless given.

Each part is a program ``cluster_PART.py`` that starts what it needs on this machine and prints a table. Times are
wall-clock, since most of it is waiting for a server, which shares the processors: compare figures of one run.
"""

import subprocess
import sys
from pathlib import Path

PARTS = ("postgres", "ray", "temporal")


def main() -> None:
    for name in sys.argv[1:] or PARTS:
        subprocess.run([sys.executable, Path(__file__).with_name(f"cluster_{name}.py")], check=True)


if __name__ == "__main__":
    main()
