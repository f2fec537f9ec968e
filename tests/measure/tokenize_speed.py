"""Tokens a second of `jaxtrain tokenize` beside one thread of `tokenizers`: `python -m tests.measure.tokenize_speed`.

The text is the standard library's source, five times, as JSON lines; the tokenizer a byte-level BPE of 32,000 ids of it.
One thread encodes text after text and keeps nothing; our figures are of the whole command: start, reading, splitting, writing.
Rounds take turns, so that other jobs slow all of them; CPU seconds are of all processes together.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxtrain.data.json_tokenizer import train_bpe
from jaxtrain.data.listing import list_stdlib

ROUNDS, TIMES, VOCABULARY = 3, 5, 32_000
ONE_THREAD = """
import json, sys
from tokenizers import Tokenizer
backend = Tokenizer.from_file(sys.argv[1])
for line in open(sys.argv[2]):
    backend.encode(json.loads(line)["text"], add_special_tokens=False).ids
"""


def main() -> None:
    """Print a line for each way and round."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [file.path.read_bytes().decode() for file in list_stdlib()]
        (folder / "tokenizer.json").write_text(train_bpe(texts, VOCABULARY))
        with (folder / "texts.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": f"{time} {text}"}) + "\n" for time in range(TIMES) for text in texts)
        paths = [str(folder / "tokenizer.json"), str(folder / "texts.jsonl")]
        ours = ["-m", "jaxtrain", "tokenize", f"--tokenizer={paths[0]}", f"--input={paths[1]}", "--kind=jsonl"]
        ours += [f"--cache_dir={folder}/cache"]
        ways = {"one thread of tokenizers": ["-c", ONE_THREAD, *paths]}
        ways |= {f"jaxtrain, {count} processes": [*ours, f"--processes={count}"] for count in (1, os.cpu_count() or 1)}
        for turn in range(ROUNDS):
            base = 0.0
            for way, command in ways.items():
                output = folder / f"{way}{turn}"
                seconds, cpu = _run(command + ([f"--output={output}"] if "jaxtrain" in way else []))
                base = base or seconds
                count = _count(output) if "jaxtrain" in way else 0
                rate = f", {count / seconds / 1e6:.2f} million tokens/s" if count else ""
                load = os.getloadavg()[0]
                print(f"{way}: {seconds:.1f} s, {cpu:.1f} s of CPU, {base / seconds:.2f} x{rate} (load {load:.1f})", flush=True)


def _run(command: list[str]) -> tuple[float, float]:
    environment = os.environ | ({"TOKENIZERS_PARALLELISM": "false"} if command[0] == "-c" else {})
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _count(output: Path) -> int:
    return sum(json.loads((output / f"{split}.json").read_text())["count"] for split in ("train", "validation"))


if __name__ == "__main__":
    main()
