"""Waits until a file is there."""

import sys
import time
from pathlib import Path

path = Path(sys.argv[1])
while not path.exists():
    time.sleep(0.1)
print(f"{path} is there")
