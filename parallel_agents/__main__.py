"""``python -m parallel_agents`` is ``parallel-agents``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
