"""Write a small chat set from the running Python's own documentation: `python -m tests.measure.chat_of_stdlib OUT.jsonl 600`.

A question about a function of the standard library, answered by the first sentence of its docstring.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import sys
from pathlib import Path

MODULES = "os os.path shutil pathlib json re math random statistics itertools functools collections heapq bisect".split()
MODULES += (
    "textwrap datetime time calendar csv io glob fnmatch tempfile subprocess threading socket struct gzip hashlib".split()
)
MODULES += "base64 string operator copy pprint decimal fractions urllib.parse html logging inspect ast types contextlib".split()
QUESTIONS = ("What does `{}` do?", "Explain `{}` in one sentence.", "What is `{}` for?", "Describe the Python function `{}`.")


def conversations(count: int) -> list[dict]:
    """Return up to `count` conversations of one or two turns, the same every time."""
    found, chance = {}, random.Random(0)
    for name in MODULES:
        module = importlib.import_module(name)
        for member, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) and not member.startswith("_") else None
            sentence = text.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".") if text else ""
            if 20 < len(sentence) < 200 and "->" not in sentence:
                found.setdefault(sentence, f"{name}.{member}")
    turns = [
        [{"role": "user", "content": chance.choice(QUESTIONS).format(name)}, {"role": "assistant", "content": f"{sentence}."}]
        for sentence, name in found.items()
    ]
    chance.shuffle(turns)
    rows = []
    while turns and len(rows) < count:
        rows.append({"messages": sum((turns.pop() for _ in range(min(len(turns), chance.choice((1, 1, 2))))), [])})
    return rows


if __name__ == "__main__":
    written = conversations(int(sys.argv[2]))
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    print(f"{len(written)} conversations in {sys.argv[1]}")
