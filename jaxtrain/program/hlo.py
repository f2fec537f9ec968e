"""Read a compiled program's text: its computations, the trip counts of its loops, and the matmul FLOPs that it will execute.

`compiled.cost_analysis()` counts the body of a scan once, and returns nothing for a GPU that is not present. Here every `while`
counts as often as it will run, and a conditional counts as its most expensive branch: the busiest pipeline stage, tick by tick.
The text of a scheduled program (`is_scheduled=true`) is in the order of its schedule; `program.collectives` reads that.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from jaxtrain.errors import ProgramError

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_FURTHER_CALLS = "/further_documents/"
"""Scope of the calls of cuDNN's attention that take of the first one's documents (`ops.attention_packed`)."""
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_GEMM_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]')
_SCORES = re.compile(r'"intermediate_tensor_shape":\s*\{[^{}]*?"dimensions":\s*\[([^\]]*)\]')
_WINDOW = re.compile(r'"sliding_window_length":\s*"?(\d+)')
_EXPECTED_ROWS = re.compile(r'\bexpected_rows="(\d+)"')
_INDEX = re.compile(r"index=(\d+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_NAME = re.compile(r"%?([\w.\-]+)$")
_LONGEST_LOOP = 1_000_000
_LARGEST_COUNTER = 2**63


@contextlib.contextmanager
def understood() -> Iterator[None]:
    """Raise unknown names, missing parts and endless calls in a program's text as `ProgramError`."""
    try:
        yield
    except ProgramError:
        raise
    except (LookupError, ValueError, ArithmeticError, RecursionError) as error:
        raise ProgramError(f"the program's text is inconsistent ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Array:
    """An array type."""

    dtype: str
    """HLO's name: bf16, f32, s32, f8e4m3fn, ..."""
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in memory; sub-byte types are packed."""
        bits = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or ["0"])[0])
        return math.ceil(math.prod(self.dims) * bits / 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    result: tuple[Array, ...]
    """The array, or the arrays of the tuple, nested ones flattened."""
    operands: tuple[str, ...]
    """Names; for a constant or a parameter's number, the text itself."""
    attributes: str
    """The text after the operands."""
    is_root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that run once whenever this instruction does (a fusion's, a call's, an async wrapper's)."""
        return tuple(_CALLED.findall(self.attributes)) if self.op in ("fusion", "call", "custom-call", "async-start") else ()

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of which a conditional runs one."""
        listed = _BRANCHES.search(self.attributes)
        names = listed.group(1).split(",") if listed else _TRUE_FALSE.findall(self.attributes)
        return tuple(name.strip().lstrip("%") for name in names)

    @property
    def body(self) -> str:
        """The body of a loop."""
        return _CALLED.findall(self.attributes)[0]


@dataclass
class Computation:
    """Instructions in the order of the text."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    by_name: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next((i for i in reversed(self.instructions) if i.is_root), self.instructions[-1])

    def operand(self, instruction: Instruction, number: int) -> Instruction | None:
        """Return the instruction that computes an operand, if the text holds it."""
        return self.by_name.get(instruction.operands[number]) if number < len(instruction.operands) else None


def arrays_of(text: str) -> tuple[Array, ...]:
    """Return all array types in a type's text, in order."""
    return tuple(Array(dtype, _dims(dims)) for dtype, dims in _ARRAY.findall(text))


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.replace('"', "").split(",") if n.strip())


def _split_operands(rest: str) -> tuple[tuple[str, ...], str]:
    """(operands, attributes) from the text after an instruction's opening parenthesis."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[(){}\[\],]", rest):
        sign, i = match.group(), match.start()
        if sign in "({[":
            depth += 1
        elif sign == "," and depth == 0:
            parts.append(rest[start:i])
            start = i + 1
        elif sign in ")}]":
            if depth == 0:
                parts.append(rest[start:i])
                return tuple(_operand_name(part) for part in parts if part.strip()), rest[i + 1 :]
            depth -= 1
    raise ProgramError(f"an instruction without an end: {rest[:200]}")


def _operand_name(text: str) -> str:
    found = _NAME.search(text.strip())  # its type may precede it
    return found.group(1) if found else text.strip()


Measure = Callable[[Computation, Instruction], float]
"""What an instruction takes itself, without what it calls."""


@dataclass
class Program:
    """A compiled module."""

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def flops(self) -> dict[str, float]:
        """{name: matmul FLOPs of one run} of each computation that is called."""
        return self.sums(own_flops)

    @functools.cached_property
    def callers(self) -> dict[str, tuple[Computation, Instruction]]:
        """{name: (computation, instruction)} of the loop of which it is the body, or of the call with its one parameter."""
        return {
            _CALLED.findall(i.attributes)[0]: (computation, i)
            for computation in self.computations.values()
            for i in computation.instructions
            if i.op == "while" or (i.op == "call" and len(i.operands) == 1)
        }

    def sums(self, own: Measure) -> dict[str, float]:
        """Return {name: sum of `own` over one run} of each computation that is called."""
        done: dict[str, float] = {}

        def total(name: str) -> float:
            if name not in done:
                computation = self.computations[name]
                done[name] = sum(self.sum_of(computation, i, own, total) for i in computation.instructions)
            return done[name]

        total(self.entry)
        return done

    def sum_of(self, computation: Computation, instruction: Instruction, own: Measure, total: Callable[[str], float]) -> float:
        """Return `own` of an instruction and all that it calls, multiplied by trip counts; `total` is that of a computation."""
        if instruction.op == "while":
            return self.trip_count(computation, instruction) * total(instruction.body)
        if instruction.op == "conditional":
            return max(total(name) for name in instruction.branches)
        called = sum(total(name) for name in instruction.called if name in self.computations)
        return own(computation, instruction) + called

    def trip_count(self, computation: Computation, loop: Instruction) -> int:
        """Return the trip count of a loop as XLA recorded it, or found by running the loop's counter.

        XLA drops the count of a loop that it changed (a pipelined loop, of which it took an iteration out). The loop over
        documents that are more than one call takes runs by the data, as a rule not at all, and has 0.

        Raises:
          ProgramError: neither is possible.
        """
        if _FURTHER_CALLS in loop.attributes:
            return 0
        known = _TRIP_COUNT.search(loop.attributes)
        if known:
            return int(known.group(1))
        try:
            return _count_trips(self, computation, loop)
        except _Unknown as why:
            shown = f"%{loop.name} = ... while({', '.join(loop.operands)}){loop.attributes}"[:200]
            raise ProgramError(f"a loop without a known trip count ({why}): {shown}") from None


def parse(text: str) -> Program:
    """Parse `compiled.as_text()`.

    Raises:
      ProgramError: the text holds no entry computation, or an instruction has no end.
    """
    with understood():
        return _parse(text)


def _parse(text: str) -> Program:
    computations: dict[str, Computation] = {}
    entry, now = "", Computation("")
    for raw in text.splitlines():
        head = _COMPUTATION.match(raw)
        if head:
            now = computations.setdefault(head.group(2), Computation(head.group(2)))
            entry = head.group(2) if head.group(1) else entry
            continue
        line = _COMMENT.sub("", raw) if "/*" in raw else raw
        match = _INSTRUCTION.match(line)
        if match:
            root, name, result, op, rest = match.groups()
            operands, attributes = _split_operands(rest)
            now.by_name[name] = Instruction(name, op, arrays_of(result), operands, attributes, bool(root))
            now.instructions.append(now.by_name[name])
    if not entry:
        raise ProgramError("this is no HLO text: it has no ENTRY computation")
    return Program(computations, entry)


def matmul_flops(text: str) -> float:
    """Return the FLOPs of all matmuls that one device executes in one run of the compiled program.

    Counted are dots and ragged dots (inside fusions too), cuBLAS calls, cuDNN's fused attention (within documents as of one a
    row, the most it can be), and our own kernels of grouped matmuls on their expected rows (`ops.grouped_matmul`: the data
    decide, and empty tiles are skipped). A conditional counts as its most expensive branch.

    Raises:
      ProgramError: a loop's trip count is neither recorded nor can be counted.
    """
    program = parse(text)
    with understood():
        return program.flops[program.entry]


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs of one instruction


def own_flops(computation: Computation, instruction: Instruction) -> float:
    """Return the matmul FLOPs of an instruction itself."""
    if instruction.op in ("dot", "ragged-dot", "scaled-dot"):
        return _matmul_flops(computation, instruction, _CONTRACTED)
    if instruction.op != "custom-call":
        return 0.0
    found = _TARGET.search(instruction.attributes)
    target = found.group(1) if found else ""
    if target.startswith("__cublas$"):
        return _matmul_flops(computation, instruction, _GEMM_CONTRACTED)
    if "/grouped_matmul/" in instruction.attributes:
        return _grouped_flops(computation, instruction)
    if _FURTHER_CALLS in instruction.attributes:
        return 0.0
    return _attention_flops(computation, instruction, target) if target.startswith("__cudnn$fmha") else 0.0


def is_float8(computation: Computation, instruction: Instruction) -> bool:
    """Return whether both operands of a matmul are float8."""
    operands = [computation.operand(instruction, number) for number in (0, 1)]
    return all(operand is not None and operand.result[0].dtype.startswith("f8") for operand in operands)


def _matmul_flops(computation: Computation, instruction: Instruction, contracted: re.Pattern[str]) -> float:
    """2 * (elements of the output) * (length of the contraction). A ragged dot does no more: each row meets one group."""
    left, found = computation.operand(instruction, 0), contracted.search(instruction.attributes)
    if left is None or found is None:
        raise ProgramError(
            f"{instruction.op} without operands or contracting dims: {instruction.name}{instruction.attributes[:200]}"
        )
    length = math.prod(left.result[0].dims[i] for i in _dims(found.group(1)))
    return 2.0 * math.prod(instruction.result[0].dims) * length


def _grouped_flops(computation: Computation, instruction: Instruction) -> float:
    """2 R D F for R expected rows: rows [S, D] by matrices [E, D, F], or the transposed [S, D] by [S, F] to [E, D, F]."""
    left, rows = computation.operand(instruction, 0), _EXPECTED_ROWS.search(instruction.attributes)
    if left is None or rows is None:
        raise ProgramError(
            f"a grouped matmul without operands or expected rows: {instruction.name}{instruction.attributes[:200]}"
        )
    return 2.0 * int(rows.group(1)) * left.result[0].dims[-1] * instruction.result[0].dims[-1]


def _attention_flops(computation: Computation, instruction: Instruction, target: str) -> float:
    """Return the FLOPs of cuDNN's fused attention over scores [B, H, L, S] with head dims N of Q and K, M of V.

    Forward Q K^T and P V: 2 B H L S (N + M). Backward, with the scores computed again, S = Q K^T, dP = dO V^T, dV, dQ, dK: 2 B
    H L S (3 N + 2 M). Under a causal mask the kernel skips the blocks that are all masked, so half of it counts, as in
    Megatron-LM; with a sliding window of w, the share w/L - w^2/(2 L^2) of the square (half for w = L).
    """
    query, value = computation.operand(instruction, 0), computation.operand(instruction, 2)
    scores = _SCORES.search(instruction.attributes)
    if query is None or value is None or scores is None:
        raise ProgramError(f"cuDNN attention without operands or scores: {instruction.name}{instruction.attributes[:200]}")
    constraints = arrays_of(instruction.attributes.partition("api_version")[0])
    n, m = (
        (constraints[0].dims[-1], constraints[2].dims[-1])
        if constraints
        else (query.result[0].dims[-1], value.result[0].dims[-1])
    )
    shape = _dims(scores.group(1))
    widths = 3 * n + 2 * m if "Backward" in target else n + m
    share = 0.5 if "CAUSAL" in instruction.attributes else 1.0
    found = _WINDOW.search(instruction.attributes)
    window = int(found.group(1)) if found else 0
    if 0 < window < shape[-1]:
        share = window / shape[-1] - window**2 / (2 * shape[-1] ** 2)
    return 2.0 * math.prod(shape) * widths * share


# ---------------------------------------------------------------------------------------------------------------------
# Loops whose trip count XLA did not record


class _Unknown(Exception):
    """A scalar that the text does not determine."""


_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "minimum": min,
    "maximum": max,
}


def _scalar(program: Program, computation: Computation, name: str, element: Callable[[int], int], inside: bool = False) -> int:
    """Return the value of an integer scalar.

    Args:
      element: value of an element of the computation's tuple parameter, or of a parameter if `inside` a fusion.
    """
    instruction = computation.by_name.get(name)
    if instruction is None:
        raise _Unknown(f"no instruction {name}")
    operands = instruction.operands

    def value(number: int) -> int:
        return _scalar(program, computation, operands[number], element, inside)

    if instruction.op == "constant":
        return {"true": 1, "false": 0}[operands[0]] if operands[0] in ("true", "false") else int(operands[0])
    if instruction.op in ("copy", "bitcast", "convert"):
        return value(0)
    if instruction.op in _BINARY:
        made = _BINARY[instruction.op](value(0), value(1))
        if abs(made) > _LARGEST_COUNTER:  # beyond any counter; ever larger numbers would take ever longer
            raise _Unknown(f"{instruction.op} {name} grows beyond 64 bits")
        return made
    if instruction.op == "compare":
        direction = instruction.attributes.partition("direction=")[2][:2]  # LT, LE, GT, GE, EQ or NE
        return int(getattr(operator, direction.lower())(value(0), value(1)))
    if instruction.op == "parameter" and inside:
        return element(int(operands[0]))
    if instruction.op in ("fusion", "call"):
        called = program.computations[instruction.called[0]]
        return _scalar(program, called, called.root.name, value, inside=True)
    if instruction.op == "get-tuple-element":
        source, index = computation.by_name.get(operands[0]), int(_INDEX.findall(instruction.attributes)[0])
        if source is not None and source.op == "tuple":
            return _scalar(program, computation, source.operands[index], element, inside)
        if source is not None and source.op == "parameter" and not inside:
            return element(index)
    raise _Unknown(f"{instruction.op} {name} is not computed from constants")


def _from_outside(program: Program, computation: Computation, name: str, index: int) -> int:
    """Return the value of an element of a tuple, which an outer loop, or a call, may hand on unchanged."""
    source = computation.by_name.get(name)
    if source is not None and source.op == "tuple":

        def of_parameter(index: int) -> int:
            return _from_caller(program, computation, index)

        return _scalar(program, computation, source.operands[index], of_parameter)
    if source is not None and source.op == "parameter":
        return _from_caller(program, computation, index)
    raise _Unknown(f"{name} is no tuple here")


def _from_caller(program: Program, computation: Computation, index: int) -> int:
    """Return the value of an element of a computation's parameter, where its caller is a call, or a loop that keeps it."""
    if computation.name not in program.callers:
        raise _Unknown(f"it begins with element {index} of {computation.name}, which nothing calls with a tuple")
    caller, instruction = program.callers[computation.name]
    if instruction.op == "while":
        kept = computation.by_name.get(computation.root.operands[index])
        if kept is None or kept.op != "get-tuple-element" or int(_INDEX.findall(kept.attributes)[0]) != index:
            raise _Unknown(f"it begins with element {index} of an outer loop, which changes it")
    return _from_outside(program, caller, instruction.operands[0], index)


def _count_trips(program: Program, computation: Computation, loop: Instruction) -> int:
    """Run only the scalars that the loop's condition reads; return the number of iterations."""
    body, condition = program.computations[loop.body], program.computations[_CONDITION.findall(loop.attributes)[0]]
    values: dict[int, int] = {}

    def read(index: int) -> int:
        if index not in values:
            values[index] = _from_outside(program, computation, loop.operands[0], index)
        return values[index]

    for trips in range(_LONGEST_LOOP):
        if not _scalar(program, condition, condition.root.name, read):
            return trips
        values = {index: _scalar(program, body, body.root.operands[index], read) for index in list(values)}
    raise _Unknown(f"it is not done after {_LONGEST_LOOP} iterations")
