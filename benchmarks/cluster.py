"""What runs on many machines cost per assignment: ``python benchmarks/cluster.py [PART ...]``, all parts unless given.

Each part is a module ``cluster_PART`` with a function ``main()``; it starts what it needs on this machine and prints a
table. Times are wall-clock, since most of it is waiting for a server, which shares the processors: compare figures of
one run.
"""

import sys
from importlib import import_module

PARTS = ("postgres",)


def main() -> None:
    for name in sys.argv[1:] or PARTS:
        import_module(f"cluster_{name}").main()


if __name__ == "__main__":
    main()
