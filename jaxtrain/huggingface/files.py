"""Read a HuggingFace folder: config.json, and weights in safetensors files, checked before any of them is used."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxtrain.errors import ExplainedError
from jaxtrain.files import user_path
from jaxtrain.huggingface.config import family_of, read_config, table_of
from jaxtrain.huggingface.mxfp4 import BLOCKS, SCALES, VALUES_OF_BLOCK, expand
from jaxtrain.text import printable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
EXPONENTS = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
TRAVELLING = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json "
    "added_tokens.json chat_template.* vocab.json vocab.txt merges.txt *.tiktoken preprocessor_config.json LICENSE* USE_POLICY*"
).split()
"""Files that go with the weights, into a run and out of it again."""
PIECE = 1 << 17
"""Numbers that `fetch` looks at together, so that a cache holds them."""
MAPPED_BYTES = 128 << 20
"""Bytes read before the files are closed: what was read of a mapped file counts as resident memory until then."""
MOST_PADDING = 0.05
"""Share of an embedding table that is usual padding: 2% at most in the models of `known.py`."""
SHOWN = 5
"""Tensors that one line of an error lists."""


log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """A tensor in a file, as its header says."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


class WeightsFolder:
    """A folder of weights, checked: every tensor of the model is there once, in its shape, and no other.

    Raises:
      ExplainedError: it is not so; names everything that is wrong.
    """

    def __init__(self, path: str | Path):
        self.path = user_path(path)
        if not self.path.is_dir():
            raise ExplainedError(f"{path} is not a folder; give one with config.json and safetensors files")
        self.config: dict[str, Any] = self._json("config.json")
        where = str(self.path / "config.json")
        self.family, self.model = family_of(self.config, where), read_config(self.config, where)
        self.table = table_of(self.family, self.model)
        self._handles: dict[Path, Any] = {}
        self._read_bytes = 0  # through these handles
        self._stored = self._headers()
        self._check()

    def __enter__(self) -> WeightsFolder:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            handle.__exit__(None, None, None)
        self._handles.clear()

    @property
    def dtype(self) -> str:
        """Dtype of the weights: config.json's, or that of most tensors."""
        said = self.config.get("dtype") or self.config.get("torch_dtype")
        if said in ("float32", "float16", "bfloat16"):
            return str(said)
        found = [tensor.dtype for tensor in self._stored.values() if tensor.dtype in DTYPES]
        return DTYPES[max(set(found), key=found.count)].name if found else "bfloat16"

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(shape) for shape in self.table.shapes().values()) * np.dtype(self.dtype).itemsize

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of config.json and of every tensor's name, dtype, shape and file: which weights these are, not their bits."""
        described = {name: (tensor.file.name, tensor.dtype, tensor.shape) for name, tensor in sorted(self._stored.items())}
        return hashlib.sha256(json.dumps([self.config, described], sort_keys=True).encode()).hexdigest()

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ExplainedError(f"{self.path} has no {name}; give a folder of a HuggingFace model") from error
        except (OSError, ValueError, RecursionError) as error:
            raise ExplainedError(f"{file} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise ExplainedError(f"{file} holds a {type(found).__name__}, not an object")
        return found

    # ------------------------------------------------------------------------------------------------------------------
    # Headers

    def _headers(self) -> dict[str, Stored]:
        """Return every tensor that the files hold, in the table's names."""
        if (self.path / INDEX).is_file():
            held = self._indexed()
        elif (self.path / SINGLE).is_file():
            held = dict(_tensors_of(self.path / SINGLE))
        else:
            pickles = sorted(file.name for kind in PICKLES for file in self.path.glob(kind))
            if pickles:
                raise ExplainedError(
                    f"{self.path} holds its weights as pickles ({pickles[0]}), which run code of whoever made them as they are "
                    "read; save the model as safetensors in an environment that you trust: "
                    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OTHER)"
                )
            raise ExplainedError(f"{self.path} has neither {SINGLE} nor {INDEX}")
        return self._in_our_names(held)

    def _indexed(self) -> dict[str, Stored]:
        files = self._json(INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ExplainedError(f"{self.path / INDEX} has no weight_map of names to files")
        problems, held = [], dict[str, Stored]()
        for file in sorted(set(files.values())):
            if Path(file).name != file:
                raise ExplainedError(f"{self.path / INDEX} names a file outside the folder: {printable(file)}")
            for name, tensor in _tensors_of(self.path / file):
                if name in held:
                    problems.append(f"{name} is in {held[name].file.name} and in {file}")
                elif files.get(name) != file:
                    says = f"in {files[name]}" if name in files else "nowhere"
                    problems.append(f"{name} is in {file}, but {INDEX} says {says}")
                held[name] = tensor
        problems += [f"{name} is not in {file}, where {INDEX} says it is" for name, file in files.items() if name not in held]
        self._refuse(problems)
        return held

    def _in_our_names(self, held: dict[str, Stored]) -> dict[str, Stored]:
        """Return the tensors under the table's names: older files of base models lack the first part of a name."""
        expected = self.table.shapes()
        found = dict(held)
        for name in expected:
            short = name.partition(".")[2]
            if name not in held and short in held and short not in expected:
                found[name] = found.pop(short)
        return found

    def _check(self) -> None:
        expected, problems = self.table.shapes(), []
        missing = [name for name in expected if name not in self._stored and f"{name}{BLOCKS}" not in self._stored]
        extra = [name for name in self._stored if name not in expected and not self._may_be_there(name)]
        problems += [_listed(missing, "missing")] if missing else []
        problems += [_listed(extra, "not part of the model that config.json describes")] if extra else []
        for name, shape in expected.items():
            tensor = self._stored.get(name)
            if tensor and tensor.shape != shape:
                problems.append(f"{name} is {list(tensor.shape)}, but config.json gives {list(shape)}")
            elif tensor and tensor.dtype not in DTYPES:
                problems.append(f"{name} is {tensor.dtype}; only {', '.join(DTYPES)} are read")
            elif tensor is None and f"{name}{BLOCKS}" in self._stored:
                problems += self._wrong_blocks(name, shape)
        self._refuse(problems)
        self._check_tied_head()

    def _may_be_there(self, name: str) -> bool:
        if name.endswith((BLOCKS, SCALES)):
            return name.removesuffix(BLOCKS).removesuffix(SCALES) in self.table.shapes()
        return self._is_tied_head(name) or any(re.fullmatch(kind, name) for kind in self.family.unneeded)

    def _is_tied_head(self, name: str) -> bool:
        return self.model.tie_embeddings and name in ("lm_head.weight", "embed_out.weight")

    def _wrong_blocks(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Return what is wrong with the two tensors of an MXFP4 matrix [experts, inputs, outputs]."""
        experts, inputs, outputs = shape
        groups = inputs // VALUES_OF_BLOCK
        wanted = {BLOCKS: (experts, outputs, groups, VALUES_OF_BLOCK // 2), SCALES: (experts, outputs, groups)}
        problems = []
        for suffix, want in wanted.items():
            tensor = self._stored.get(f"{name}{suffix}")
            if tensor is None or tensor.shape != want or tensor.dtype != "U8":
                found = "missing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
                problems.append(f"{name}{suffix} is {found}, but config.json gives U8{list(want)}")
        return problems

    def _check_tied_head(self) -> None:
        """Refuse a head that differs from the embedding table where config.json says that they are one."""
        table = next(row.theirs for row in self.table.rows if row.ours == "outer/table")
        for name in [name for name in self._stored if self._is_tied_head(name)]:
            rows = self.table.shapes()[table][0]
            for start in range(0, rows, 4096):
                part = (slice(start, min(start + 4096, rows)), slice(None))
                if not np.array_equal(self.fetch(name, part), self.fetch(table, part)):
                    raise ExplainedError(
                        f"{self.path}: {name} is not {table}, but config.json has tie_word_embeddings=true; set it to false if "
                        "the head is its own, or remove the tensor"
                    )

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            more = f"\n  - and {len(problems) - 12} more" if len(problems) > 12 else ""
            listed = "".join(f"\n  - {printable(problem)}" for problem in problems[:12])
            raise ExplainedError(f"{self.path} does not hold the weights of its config.json:{listed}{more}")

    def check_tokenizer(self, vocab_size: int) -> None:
        """Refuse a tokenizer.json with ids beyond a vocabulary, and warn of one that leaves much of the embedding table unused.

        Raises:
          ExplainedError: it has such ids, or cannot be read.
        """
        file, rows = self.path / "tokenizer.json", self.model.vocab_size
        if not file.is_file():
            return
        try:
            described = self._json("tokenizer.json")
            pieces = described.get("model", {}).get("vocab", {})
            ids = pieces.values() if isinstance(pieces, dict) else range(len(pieces))
            count = 1 + max([-1, *ids, *(token["id"] for token in described.get("added_tokens", []))])
        except (ExplainedError, AttributeError, TypeError, KeyError) as error:
            raise ExplainedError(f"{file} is no tokenizer.json ({type(error).__name__}: {error}); fetch it again") from error
        if count > vocab_size:
            whose = "config.json has" if vocab_size == rows else f"config.json has vocab_size={rows}, and the run"
            raise ExplainedError(
                f"{file} has ids up to {count - 1}, but {whose} vocab_size={vocab_size}: give the tokenizer of these weights, "
                f"or add rows for its tokens: train with --init_from={self.path} --model.vocab_size={count}"
            )
        if 0 < count < (1 - MOST_PADDING) * rows:
            log.warning(
                "%s has %d ids, but the embedding table of these weights %d rows: is it their tokenizer?", file, count, rows
            )

    # ------------------------------------------------------------------------------------------------------------------
    # Numbers

    def fetch(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a tensor, in its file's dtype.

        Raises:
          ExplainedError: it cannot be read, or a number in it is not finite.
        """
        if name not in self._stored and f"{name}{BLOCKS}" in self._stored:
            blocks = self._read(f"{name}{BLOCKS}", index[:1])
            return expand(blocks, self._read(f"{name}{SCALES}", index[:1]))[(slice(None), *index[1:])]
        array, kind = self._read(name, index), self._stored[name].dtype
        words, exponent = EXPONENTS[kind]
        bits = np.ascontiguousarray(array).view(words).reshape(-1)
        pieces = (bits[start : start + PIECE] for start in range(0, bits.size, PIECE))  # which a cache holds
        if any((piece & words(exponent) == exponent).any() for piece in pieces):
            raise ExplainedError(f"{self.path}: {name} holds numbers that are not finite (NaN or infinity)")
        return array

    def _read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = self._stored[name]
        with _named(tensor.file):
            if self._read_bytes > MAPPED_BYTES:
                self.__exit__()
                self._read_bytes = 0
            if tensor.file not in self._handles:  # a large header takes milliseconds to parse
                self._handles[tensor.file] = safe_open(tensor.file, framework="numpy").__enter__()
            array = self._handles[tensor.file].get_slice(tensor.name)[index]
            self._read_bytes += array.nbytes
            return array


def travelling_files(folder: Path) -> list[Path]:
    """Return the files of a folder, if it is there, that go with the weights: config, tokenizer, chat template, licence."""
    return sorted({file for kind in TRAVELLING for file in folder.glob(kind) if file.is_file()})


def _listed(names: list[str], what: str) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}: {what}"


def _tensors_of(file: Path) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of a file's header."""
    with _named(file), safe_open(file, framework="numpy") as opened:
        names: list[str] = opened.keys()  # it is no dict
        for name in names:
            part = opened.get_slice(name)
            yield name, Stored(file, name, part.get_dtype(), tuple(part.get_shape()))


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Name the file in what the safetensors library says is wrong with it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ExplainedError(f"{file} is missing") from error
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ExplainedError(f"{file} is no whole safetensors file: {printable(str(error))}; fetch it again") from error
