"""Opening this room costs nothing, and no file in it names jax."""

import subprocess
import sys
from pathlib import Path

import jaxtrain.data

HEAVY = ("jax", "flax", "grain", "tokenizers", "sentencepiece", "pyarrow", "array_record", "rich")


def test_heavy_packages_are_imported_only_when_needed():
    modules = "sys, jaxtrain.data.pipeline, jaxtrain.verbs.tokenize"
    program = f"import {modules}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_of_the_data_room_imports_jax():
    (folder,) = jaxtrain.data.__path__
    lines = [line.split() for path in Path(folder).glob("*.py") for line in path.read_text().splitlines()]
    assert not [words for words in lines if words[:1] in (["import"], ["from"]) and words[1].partition(".")[0] == "jax"]
