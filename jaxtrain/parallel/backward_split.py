"""Split a backward pass in two: what its urgent results need, and the weight-gradient matmuls, which can wait.

`jax.vjp` gives one function for the gradients of a stage's input and of its weights. Two partial vjps are no split: the one for
the weights would run the whole chain of activation gradients again. So the function's jaxpr is cut: the first part computes the
urgent results and everything else that waits for no put-off matmul; the second part is the matmuls that no urgent result needs,
and what follows from them. The values that cross are the operands of those matmuls. A loop that has both is cut into two loops,
with the crossing values stacked. No equation with a matmul runs twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from jaxtrain.jax_private import scan_carries
from jaxtrain.sharding import vary, varying_axes

MATMULS = ("dot_general", "ragged_dot", "ragged_dot_general", "pallas_call", "conv_general_dilated")
_CHEAP = ("convert_element_type", "reshape", "transpose", "broadcast_in_dim", "squeeze", "pvary", "copy")
"""Primitives that the second part repeats, if that makes what crosses no larger."""

Key = Any
"""A variable of a jaxpr, or (equation, number) of a value that a cut loop stacks."""


def subjaxprs(eqn: Any) -> Iterable[Any]:
    """Yield the jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def _has_matmul(eqn: Any) -> bool:
    return eqn.primitive.name in MATMULS or any(_has_matmul(inner) for sub in subjaxprs(eqn) for inner in sub.eqns)


def _scoped(eqn: Any, do: Callable[[], Any]) -> Any:
    name = str(eqn.source_info.name_stack)
    if not name:
        return do()
    with jax.named_scope(name):
        return do()


def _bind(eqn: Any, operands: Sequence[Any]) -> dict[Any, Any]:
    """Run one equation: {variable: value} of its results.

    An operand may vary over more axes than when the equation was traced: then the others are typed to vary over these too.
    """
    if eqn.primitive.name == "pvary":
        return dict(zip(eqn.outvars, vary(list(operands), eqn.params["axes"]), strict=True))
    if any(True for _ in subjaxprs(eqn)):
        given = {atom: value for atom, value in zip(eqn.invars, operands, strict=True) if isinstance(atom, core.Var)}
        made = [var for var in eqn.outvars if not isinstance(var, core.DropVar)]
        info = core.DebugInfo("backward_split", "equation", ("",) * len(given), ("",) * len(made))
        alone = core.Jaxpr((), list(given), made, [eqn], eqn.effects, info)
        return dict(zip(made, core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values()), strict=True))
    axes = sorted(frozenset().union(*map(varying_axes, operands)))
    operands = [vary(jnp.asarray(value), axes) for value in operands] if axes else operands
    with eqn.ctx.manager:
        made = _scoped(eqn, lambda: eqn.primitive.bind(*operands, **eqn.params))
    return dict(zip(eqn.outvars, made if eqn.primitive.multiple_results else [made], strict=True))


def _vars(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if isinstance(atom, core.Var)]


def _behind_barrier(values: list[Any]) -> list[Any]:
    """Put the values behind one optimization_barrier for each type of varying, since it would make their types equal."""
    types = [jax.typeof(value).manual_axis_type for value in values]
    out = list(values)
    for kind in set(types):
        alike = [i for i, own in enumerate(types) if own == kind]
        for i, value in zip(alike, lax.optimization_barrier([values[i] for i in alike]), strict=True):
            out[i] = value
    return out


def _inlined(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr with calls and recomputed regions opened; these begin with their optimization_barrier."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return env[atom] if isinstance(atom, core.Var) else atom.val

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if eqn.primitive is primitives.remat_p:
            operands = _behind_barrier(operands) if eqn.params["prevent_cse"] else operands
            made = _scoped(eqn, lambda eqn=eqn, operands=operands: _inlined(eqn.params["jaxpr"], (), operands))
        elif eqn.primitive is primitives.jit_p:
            inner = eqn.params["jaxpr"]
            made = _scoped(eqn, lambda inner=inner, operands=operands: _inlined(inner.jaxpr, inner.consts, operands))
        else:
            env.update(_bind(eqn, operands))
            continue
        env.update(zip(eqn.outvars, made, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _flat(closed: Any, like: Sequence[Any]) -> Any:
    """Return a closed jaxpr with calls opened."""
    return jax.make_jaxpr(lambda *arguments: _inlined(closed.jaxpr, closed.consts, arguments))(*like)


def _struct(aval: Any) -> Any:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding, manual_axis_type=aval.manual_axis_type)


# ---------------------------------------------------------------------------------------------------------------------
# What is needed


def _body(eqn: Any) -> Any:
    """Return a loop's body, with calls opened."""
    body, found = eqn.params["jaxpr"], []
    # make_jaxpr takes no abstract values that vary over mesh axes; it takes the tracers of eval_shape.
    jax.eval_shape(lambda *like: found.append(_flat(body, like)), *(_struct(var.aval) for var in body.jaxpr.invars))
    return found[0]


def _operands_needed(eqn: Any, wanted: list[bool]) -> list[Any]:
    """Return the operands that some of an equation's results need."""
    if not any(wanted):
        return []
    if eqn.primitive.name == "optimization_barrier":
        return _vars(atom for atom, want in zip(eqn.invars, wanted, strict=True) if want)
    if eqn.primitive is not primitives.scan_p:
        return _vars(eqn.invars)
    inputs, _ = _loop_needs(eqn, eqn.params["jaxpr"].jaxpr, wanted)
    return _vars(atom for atom, need in zip(eqn.invars, inputs, strict=True) if need)


def _loop_needs(eqn: Any, body: Any, wanted: list[bool]) -> tuple[list[bool], list[bool]]:
    """(inputs, results) of a loop's body that are needed for some results of the loop: a carry needs itself."""
    carries, wanted = scan_carries(eqn.params), list(wanted)
    while True:
        needed = _needed(body, wanted)
        inputs = [var in needed for var in body.invars]
        more = [a or b for a, b in zip(wanted, inputs[carries], strict=False)]
        if more == wanted[: len(more)]:
            return inputs, wanted
        wanted[: len(more)] = more


def _needed(jaxpr: Any, wanted: Sequence[bool]) -> set[Any]:
    """Return the variables that some results of a jaxpr need."""
    needed = set(_vars(atom for atom, want in zip(jaxpr.outvars, wanted, strict=True) if want))
    for eqn in reversed(jaxpr.eqns):
        needed.update(_operands_needed(eqn, [var in needed for var in eqn.outvars]))
    return needed


# ---------------------------------------------------------------------------------------------------------------------
# The cut


@dataclass
class _Loop:
    """A loop that is cut in two."""

    plan: _Plan
    stacked: list[tuple[int, Any]]
    """(number, variable of the body) of each crossing value that is no operand of the loop."""


@dataclass
class _Plan:
    """A jaxpr cut in two."""

    jaxpr: Any
    consts: dict[Any, Any]
    """Values of the jaxpr's constants, by variable: both parts have them."""
    late: set[Any]
    """Variables that the second part computes."""
    loops: dict[int, _Loop]
    """By the equation's number: loops with both parts."""
    second: list[int]
    """Equations of the second part."""
    crossing: list[Key]

    @property
    def waits(self) -> list[bool]:
        """For each result, whether the second part computes it."""
        return [isinstance(atom, core.Var) and atom in self.late for atom in self.jaxpr.outvars]


def _plan_loop(eqn: Any, wanted: list[bool], late: list[bool]) -> _Loop:
    """Cut a loop of which some results are urgent; `late` says which operands come only in the second part."""
    body, carries = _body(eqn), scan_carries(eqn.params)
    _, wanted = _loop_needs(eqn, body.jaxpr, wanted)
    while True:
        plan = _plan(body, wanted, late)
        more = [a or b for a, b in zip(late[carries], plan.waits, strict=False)]
        if more == late[carries]:
            break
        late = [*late[: carries.start], *more, *late[carries.stop :]]
    operands = {var for i, var in enumerate(body.jaxpr.invars) if not carries.start <= i < carries.stop}
    stacked = [key for key in plan.crossing if key not in operands]
    return _Loop(plan, list(enumerate(stacked)))


def _plan(closed: Any, urgent: Sequence[bool], late_inputs: Sequence[bool]) -> _Plan:
    jaxpr = closed.jaxpr
    needed, loops = _needed(jaxpr, urgent), {}
    late = {var for var, is_late in zip(jaxpr.invars, late_inputs, strict=True) if is_late}
    for i, eqn in enumerate(jaxpr.eqns):
        wanted, waits = [var in needed for var in eqn.outvars], [a in late for a in map(_key, eqn.invars)]
        if eqn.primitive.name == "optimization_barrier":
            late.update(var for var, is_late in zip(eqn.outvars, waits, strict=True) if is_late)
        elif any(wanted):
            if eqn.primitive is primitives.scan_p and not all(wanted) and (any(waits) or _has_matmul(eqn)):
                loop = _plan_loop(eqn, wanted, waits)
                late.update(var for var, is_late in zip(eqn.outvars, loop.plan.waits, strict=True) if is_late)
                loops |= {i: loop} if any(loop.plan.waits) else {}
        elif any(waits) or _has_matmul(eqn):
            late.update(eqn.outvars)
    plan = _Plan(jaxpr, dict(zip(jaxpr.constvars, closed.consts, strict=True)), late, loops, [], [])
    _choose_crossing(plan)
    return plan


def _key(atom: Any) -> Any:
    return atom if isinstance(atom, core.Var) else None


def _second_operands(plan: _Plan, i: int) -> list[Key]:
    """Return the keys that equation i reads in the second part."""
    eqn = plan.jaxpr.eqns[i]
    if eqn.primitive.name == "optimization_barrier":
        return [a for a, v in zip(eqn.invars, eqn.outvars, strict=True) if v in plan.late]
    if i not in plan.loops:
        return _vars(eqn.invars)
    loop, carries, body = plan.loops[i], scan_carries(eqn.params), plan.loops[i].plan.jaxpr
    own = set(loop.plan.crossing)
    read = [
        a
        for j, (a, v) in enumerate(zip(eqn.invars, body.invars, strict=True))
        if v in own | loop.plan.late and (not carries.start <= j < carries.stop or v in loop.plan.late)
    ]
    return [*_vars(read), *((i, n) for n, _ in loop.stacked)]


def _bytes(atom: Any) -> int:
    return math.prod(atom.aval.shape) * atom.aval.dtype.itemsize


def _choose_crossing(plan: _Plan) -> None:
    """Fill `second` and `crossing`: what the late results need, and cheap equations again where that makes less to keep."""
    made_by = {var: i for i, eqn in enumerate(plan.jaxpr.eqns) for var in eqn.outvars}
    wanted = [atom for atom, waits in zip(plan.jaxpr.outvars, plan.waits, strict=True) if waits]
    second, crossing, seen = set(), {}, set()
    while wanted:
        key = wanted.pop()
        if key in seen:
            continue
        seen.add(key)
        i = made_by.get(key)
        if i is not None and key not in plan.late:
            eqn = plan.jaxpr.eqns[i]
            again = eqn.primitive.name in _CHEAP and all(_bytes(a) <= _bytes(key) for a in _vars(eqn.invars))
            i = i if again else None
        if i is None:
            if key not in plan.late and key not in plan.consts:  # late ones are inputs that come with the second part
                crossing[key] = None
        elif i not in second:
            second.add(i)
            wanted.extend(_second_operands(plan, i))
    plan.second, plan.crossing = sorted(second), list(crossing)


# ---------------------------------------------------------------------------------------------------------------------
# Running the parts


def _run_first(plan: _Plan, arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(results that do not wait, crossing values)"""
    env: dict[Key, Any] = plan.consts | dict(zip(plan.jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return env.get(atom) if isinstance(atom, core.Var) else atom.val

    for i, eqn in enumerate(plan.jaxpr.eqns):
        if i in plan.loops:
            env.update(_first_loop(plan.loops[i], i, eqn, [read(atom) for atom in eqn.invars]))
            continue
        pairs = list(zip(eqn.invars, eqn.outvars, strict=False))
        if eqn.primitive.name == "optimization_barrier":
            pairs = [(a, v) for a, v in pairs if v not in plan.late]
            if pairs:
                env.update(zip((v for _, v in pairs), lax.optimization_barrier([read(a) for a, _ in pairs]), strict=True))
        elif not plan.late.intersection(eqn.outvars):
            env.update(_bind(eqn, [read(atom) for atom in eqn.invars]))
    outs = [read(a) for a, waits in zip(plan.jaxpr.outvars, plan.waits, strict=True) if not waits]
    return outs, [env[key] for key in plan.crossing]


def _first_loop(loop: _Loop, i: int, eqn: Any, operands: list[Any]) -> dict[Key, Any]:
    plan, carries = loop.plan, scan_carries(eqn.params)
    count, waits = carries.stop - carries.start, plan.waits
    kept = [not late for late in waits]
    keep = [n for n in range(count) if kept[n]]
    order = {var: n for n, var in enumerate(plan.crossing)}

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], tuple]:
        held = dict(zip(keep, carry, strict=True))
        arguments = [*operands[: carries.start], *(held.get(n) for n in range(count)), *xs]
        outs, crossing = _run_first(plan, arguments)
        return outs[: len(keep)], (outs[len(keep) :], [crossing[order[var]] for _, var in loop.stacked])

    init = [operands[carries][n] for n in keep]
    carry, (ys, stacked) = _scoped(eqn, lambda: _scan(eqn, step, init, operands[carries.stop :]))
    made = dict(zip((v for v, k in zip(eqn.outvars, kept, strict=True) if k), (*carry, *ys), strict=True))
    return made | {(i, n): value for (n, _), value in zip(loop.stacked, stacked, strict=True)}


def _scan(eqn: Any, step: Callable, init: Any, xs: Any) -> Any:
    params = eqn.params
    return lax.scan(step, init, xs, params["length"], params["reverse"], params["unroll"])


def _run_second(plan: _Plan, env: dict[Key, Any]) -> list[Any]:
    """Return the results that waited. `env` holds the crossing values and the late inputs."""
    env = plan.consts | env

    def read(atom: Any) -> Any:
        return env.get(atom) if isinstance(atom, core.Var) else atom.val

    for i in plan.second:
        eqn = plan.jaxpr.eqns[i]
        if i in plan.loops:
            env.update(_second_loop(plan.loops[i], i, eqn, [read(atom) for atom in eqn.invars], env))
            continue
        if eqn.primitive.name == "optimization_barrier":
            # The order that barriers impose is the first part's. Here a matrix's sum over devices may start at once.
            env.update({v: read(a) for a, v in zip(eqn.invars, eqn.outvars, strict=True) if v in plan.late})
        else:
            env.update(_bind(eqn, [read(atom) for atom in eqn.invars]))
    return [read(a) for a, waits in zip(plan.jaxpr.outvars, plan.waits, strict=True) if waits]


def _second_loop(loop: _Loop, i: int, eqn: Any, operands: list[Any], env: dict[Key, Any]) -> dict[Key, Any]:
    plan, carries = loop.plan, scan_carries(eqn.params)
    late = [n for n in range(carries.stop - carries.start) if plan.waits[n]]
    names = [var for _, var in loop.stacked]

    def step(carry: list[Any], xs: tuple) -> tuple[list[Any], list[Any]]:
        own, stacked = xs
        inner = dict(zip(plan.jaxpr.invars[: carries.start], operands[: carries.start], strict=True))
        inner |= dict(zip(plan.jaxpr.invars[carries.stop :], own, strict=True)) | dict(zip(names, stacked, strict=True))
        inner |= {plan.jaxpr.invars[carries.start + n]: value for n, value in zip(late, carry, strict=True)}
        outs = _run_second(plan, inner)
        return outs[: len(late)], outs[len(late) :]

    stacked = [env[i, n] for n, _ in loop.stacked]
    init = [operands[carries][n] for n in late]
    carry, ys = _scoped(eqn, lambda: _scan(eqn, step, init, (operands[carries.stop :], stacked)))
    outs = [v for v, waits in zip(eqn.outvars, plan.waits, strict=True) if waits]
    return dict(zip(outs, (*carry, *ys), strict=True))


class Split:
    """A function of arrays in two parts: `first` gives the urgent results, `second` those that wait.

    Args:
      function: takes arrays, returns a list of arrays.
      like: arrays to trace it with.
      urgent: for each result, whether the first part must give it. It gives those of the others too that wait for no matmul.
    """

    def __init__(self, function: Callable[..., list[Any]], like: Sequence[Any], urgent: Sequence[bool]):
        closed = jax.make_jaxpr(function)(*like)
        flat = _flat(closed, like)
        self.plan = _plan(flat, urgent, [False] * len(like))
        place = {var: i for i, var in enumerate(flat.jaxpr.invars)}
        self.inputs = [place.get(key) for key in self.plan.crossing]
        """For each crossing value, the number of the argument that it is, or None."""

    @property
    def waits(self) -> list[bool]:
        """For each result, whether the second part gives it."""
        return self.plan.waits

    def first(self, *arguments: Any) -> tuple[list[Any], list[Any]]:
        """(results that do not wait, crossing values)"""
        return _run_first(self.plan, arguments)

    def second(self, crossing: Sequence[Any]) -> list[Any]:
        """Return the results that waited."""
        return _run_second(self.plan, dict(zip(self.plan.crossing, crossing, strict=True)))
