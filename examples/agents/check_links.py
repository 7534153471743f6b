"""Checks that the files exist to which the Markdown pages below a folder link."""

import re
import sys
from pathlib import Path

from repository import files

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")

count = 0
broken = []
for page in files(Path(sys.argv[1]), ".md"):
    for target in LINK.findall(page.read_text("utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        count += 1
        if not (page.parent / target).exists():
            broken.append(f"{page}: {target}")
print(f"{count} links checked, {len(broken)} of them broken", *broken, sep="\n")
