"""Counts the words of the Markdown pages below a folder."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

from repository import files

words: Counter[str] = Counter()
for page in files(Path(sys.argv[1]), ".md"):
    words.update(re.findall(r"[a-z]{4,}", page.read_text("utf-8").lower()))
print(json.dumps(dict(words.most_common(10))))
