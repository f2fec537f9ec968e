"""Collectives of small texts by hand: groups, bytes, overlap; and of compiled programs on fake CPU devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxtrain.hardware import find_chip
from jaxtrain.program.collectives import CollectiveRow, Transfer, instruction_seconds, read_collectives, table
from jaxtrain.program.groups import Group, MeshOrder, device_groups, layout_of, locate

# 2 hosts of 4 devices; ids run over data, then fsdp, then tensor.
LAYOUT = MeshOrder(("data", "fsdp", "tensor"), (2, 2, 2), (0, 0, 0, 0, 1, 1, 1, 1))
# A chip for round numbers: 1 GFLOP/s, 1 MB/s inside a host, 100 kB/s and device beyond.
CHIP = dataclasses.replace(find_chip("h100-sxm"), link_bandwidth=1e6, nic_bandwidth=1e5)
PEAK = 1e9

# ---------------------------------------------------------------------------------------------------------------------
# Device groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2), x", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]) {'a'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_groups(text: str, groups: list[list[int]]):
    assert np.asarray(device_groups(text, 8)).tolist() == groups


def test_groups_in_an_unknown_form():
    with pytest.raises(ValueError, match="replica_groups=<8>"):
        device_groups("replica_groups=<8>", 8)


@pytest.mark.parametrize(
    ("groups", "place"),
    [
        ([[0, 1], [2, 3], [4, 5], [6, 7]], Group("tensor", 2, False, 2)),
        ([[0, 2], [1, 3], [4, 6], [5, 7]], Group("fsdp", 2, False, 2)),
        ([[0, 4], [1, 5], [2, 6], [3, 7]], Group("data", 2, True, 1)),
        ([[0, 1, 4, 5], [2, 3, 6, 7]], Group("data+tensor", 4, True, 2)),
        ([list(range(8))], Group("data+fsdp+tensor", 8, True, 4)),
        ([[0], [1]], Group("", 1, False, 1)),
    ],
)
def test_where_groups_lie(groups: list[list[int]], place: Group):
    assert locate(groups, LAYOUT) == place


# ---------------------------------------------------------------------------------------------------------------------
# Bytes, of texts by hand

TENSOR, DATA = "replica_groups={{0,1},{2,3},{4,5},{6,7}}", "replica_groups=[4,2]<=[2,4]T(1,0)"
A, B = "%a = bf16[100]{0} parameter(0)", "%b = f32[50]{0} parameter(1)"
C = "%c = bf16[300]{0} parameter(2)"


def program(*lines: str, computations: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule test, is_scheduled=true\n{computations}\nENTRY %main (a: bf16[100]) -> bf16[100] {{\n{body}\n}}\n"


def rows(text: str, layout: MeshOrder = LAYOUT) -> list[CollectiveRow]:
    return table(read_collectives(text, layout, CHIP, PEAK))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"%g = bf16[200]{{0}} all-gather(%a), {TENSOR}", ("tensor", "all-gather", "bf16", 400, 200)),
        (f"%g = bf16[50]{{0}} reduce-scatter(%a), {TENSOR}, to_apply=%add", ("tensor", "reduce-scatter", "bf16", 200, 100)),
        (f"%g = bf16[100]{{0}} all-reduce(%a), {DATA}, to_apply=%add", ("data", "all-reduce", "bf16", 200, 200)),
        (f"%g = bf16[100]{{0}} all-to-all(%a), {DATA}", ("data", "all-to-all", "bf16", 200, 100)),
        (
            f"%g = bf16[9]{{0}} ragged-all-to-all(%a, %b, %b, %b, %b, %b), {DATA}",
            ("data", "ragged-all-to-all", "bf16", 200, 100),
        ),
        (
            "%g = bf16[100]{0} collective-permute(%a), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}",
            ("fsdp", "collective-permute", "bf16", 200, 200),
        ),
        (f"%g = (bf16[100], bf16[200]) all-gather-start(%a), {TENSOR}", ("tensor", "all-gather", "bf16", 400, 200)),
        ("%g = (bf16[100], bf16[200]) async-start(%a), calls=%wrapped", ("tensor", "all-gather", "bf16", 400, 200)),
        ("%g = bf16[200] fusion(%a), calls=%wrapped", ("tensor", "all-gather", "bf16", 400, 200)),
    ],
)
def test_bytes(line: str, expected: tuple):
    wrapped = (
        "%wrapped (p: bf16[100]) -> bf16[200] {\n  %p = bf16[100]{0} parameter(0)\n"
        f"  ROOT %w = bf16[200]{{0}} all-gather(%p), {TENSOR}\n}}\n"
    )
    (row,) = rows(program(A, B, C, line, computations=wrapped))
    assert (row.axes, row.kind, row.dtype, row.payload, row.wire) == expected
    assert row.calls == 1


def test_what_instructions_take():
    """200 bytes over tensor inside a host take 0.2 ms, 200 over data to another host ten times that; 2e6 FLOPs at the peak."""
    lines = (
        A,
        "%x = f32[100,100]{1,0} parameter(1)",
        f"%near = (bf16[100], bf16[200]) all-gather-start(%a), {TENSOR}",
        f"%far = bf16[100]{{0}} all-reduce(%a), {DATA}, to_apply=%add",
        "%d = f32[100,100]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "%near_done = bf16[200] all-gather-done(%near)",
        "%small = bf16[100]{0} add(%a, %a)",
    )
    seconds = instruction_seconds(program(*lines), LAYOUT, CHIP)
    peak = find_chip("h100-sxm").peak("bfloat16")
    assert seconds == pytest.approx({"near": 2e-4, "far": 2e-3, "d": max(1e-6, 2e6 / peak), "small": 1e-6})


def test_a_combined_collective_is_told_apart_by_dtype():
    line = f"%g = ((bf16[100], f32[50]), (bf16[200], /*index=1*/f32[100])) all-gather-start(%a, /*index=1*/%b), {TENSOR}"
    assert {(row.dtype, row.payload) for row in rows(program(A, B, line))} == {("bf16", 400), ("f32", 400)}


def test_nothing_moves_within_a_device():
    alone = "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}"
    itself = "%p = bf16[100]{0} collective-permute(%a), source_target_pairs={{0,0},{1,1}}"
    assert rows(program(A, f"%g = bf16[100]{{0}} all-gather(%a), {alone}", itself)) == []


def test_point_to_point_sends_are_refused():
    with pytest.raises(ValueError, match="%s: a point-to-point send is not counted"):
        rows(program(A, "%t = token[] after-all()", "%s = (bf16[100], u32[], token[]) send(%a, %t), channel_id=1"))


# ---------------------------------------------------------------------------------------------------------------------
# Overlap. A matmul takes 1 ms; a gather over tensor takes 1 ms a kB.

MATMUL = """
%ms (x: f32[50,100], y: f32[100,100]) -> f32[50,100] {
  %x = f32[50,100]{1,0} parameter(0)
  %y = f32[100,100]{1,0} parameter(1)
  ROOT %d = f32[50,100]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
WEIGHT = "%w = bf16[1000]{0} parameter(0)"  # a gather over tensor puts 2 kB on the wire: 2 ms
START = f"%s = (bf16[1000], bf16[2000]) all-gather-start(%w), {TENSOR}"
DONE = "%g = bf16[2000] all-gather-done(%s)"


def matmul(name: str) -> str:
    return f"%{name} = f32[50,100] fusion(%i, %i), calls=%ms"


def gather(*lines: str, computations: str = "") -> Transfer:
    found = read_collectives(program(WEIGHT, *lines, computations=MATMUL + computations), LAYOUT, CHIP, PEAK)
    return found[0]


@pytest.mark.parametrize(
    ("lines", "hidden", "overlapped"),
    [
        ([START, DONE, matmul("m")], 0, 0),
        ([START, matmul("m"), DONE], 1000, 2000),
        ([START, matmul("m"), matmul("n"), matmul("o"), DONE], 2000, 2000),
        ([START.replace("-start", ""), matmul("m")], 0, 0),
        ([START + ', backend_config={"is_sync":true}', matmul("m"), DONE], 0, 0),
    ],
)
def test_what_travels_behind_a_matmul_is_hidden(lines: list[str], hidden: float, overlapped: float):
    transfer = gather(*lines)
    assert (transfer.wire, transfer.hidden, transfer.overlapped) == pytest.approx((2000, hidden, overlapped))


DOT = "%m = bf16[50,100] dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
GEMM = (
    '%m = (bf16[50,100], s8[9]) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul$f8", '
    'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
)


@pytest.mark.parametrize("multiply", [DOT, GEMM])
@pytest.mark.parametrize(
    ("left", "right", "hidden"), [("f8e4m3fn", "f8e5m2", 500), ("f8e4m3fn", "bf16", 1000), ("bf16", "bf16", 1000)]
)
def test_matmuls_of_float8_run_at_its_peak(left: str, right: str, hidden: float, multiply: str):
    chip = dataclasses.replace(CHIP, peak_flops={"bfloat16": PEAK, "float8": 2 * PEAK})
    operands = f"%x = {left}[50,100]{{1,0}} parameter(1)", f"%y = {right}[100,100]{{1,0}} parameter(2)"
    (found,) = read_collectives(program(WEIGHT, *operands, START, multiply, DONE), LAYOUT, chip)
    assert found.hidden == pytest.approx(hidden)


def test_transfers_on_one_link_queue():
    """Two gathers of 2 ms start together; 3 ms of compute hide the first and half of the second."""
    second = [START.replace("%s", "%s2"), DONE.replace("%s", "%s2").replace("%g", "%g2")]
    lines = [START, second[0], matmul("m"), matmul("n"), matmul("o"), DONE, second[1]]
    transfers = read_collectives(program(WEIGHT, *lines, computations=MATMUL), LAYOUT, CHIP, PEAK)
    assert [transfer.hidden for transfer in transfers] == pytest.approx([2000, 1000])


def test_links_between_hosts_are_slower():
    """Over data the same gather takes 20 ms on one NIC: a millisecond hides a twentieth."""
    assert gather(START.replace(TENSOR, DATA), matmul("m"), DONE).hidden == pytest.approx(100)


def loop(body: str, trips: int) -> tuple[list[str], str]:
    """A gather begun before a loop, handed through it, renewed in each iteration, and done after it."""
    lines = [
        START,
        "%t = (bf16[1000], (bf16[1000], bf16[2000])) tuple(%w, %s)",
        "%l = (bf16[1000], (bf16[1000], bf16[2000])) while(%t), body=%b, "
        f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}',
        "%r = (bf16[1000], bf16[2000]) get-tuple-element(%l), index=1",
        "%last = bf16[2000] all-gather-done(%r)",
    ]
    head = "%b (p: (bf16[1000], (bf16[1000], bf16[2000]))) -> (bf16[1000], (bf16[1000], bf16[2000])) {\n"
    return lines, head + body + "}\n"


def test_a_transfer_may_end_in_the_next_iteration():
    """Each of 10 iterations waits for the gather that the one before began, after half a millisecond of compute before it."""
    lines, body = loop(
        "  %p = (bf16[1000], (bf16[1000], bf16[2000])) parameter(0)\n"
        "  %w2 = bf16[1000] get-tuple-element(%p), index=0\n"
        "  %before = (bf16[1000], bf16[2000]) get-tuple-element(%p), index=1\n"
        f"  {matmul('m')}\n"
        "  %g = bf16[2000] all-gather-done(%before)\n"
        f"  %s2 = (bf16[1000], bf16[2000]) all-gather-start(%w2), {TENSOR}\n"
        "  ROOT %o = (bf16[1000], (bf16[1000], bf16[2000])) tuple(%w2, %s2)\n",
        10,
    )
    found = read_collectives(program(WEIGHT, *lines, computations=MATMUL + body), LAYOUT, CHIP, PEAK)
    assert sum(transfer.calls for transfer in found) == 11
    # The ten that a matmul follows are half hidden; nothing follows the last.
    assert sum(transfer.hidden for transfer in found) == pytest.approx(10 * 1000)
    assert sum(transfer.overlapped for transfer in found) == pytest.approx(10 * 2000)


def test_a_conditional_is_its_dearest_branch():
    branches = (
        "%many (p: bf16[1000]) -> bf16[2000] {\n  %p = bf16[1000] parameter(0)\n"
        f"  ROOT %g2 = bf16[2000] all-gather(%p), {TENSOR}\n}}\n"
        f"%few (p: bf16[1000]) -> bf16[1000] {{\n  %p = bf16[1000] parameter(0)\n  {matmul('m')}\n"
        f"  ROOT %g3 = bf16[1000] all-reduce(%p), {DATA}\n}}\n"
    )
    line = "%if = bf16[2000] conditional(%c, %w, %w), true_computation=%many, false_computation=%few"
    assert gather(line, computations=branches).kind == "all-reduce"
    without = branches.replace(f"  {matmul('m')}\n", "").replace("%g3 = bf16[1000] all-reduce", "%g3 = bf16[1000] all-to-all")
    assert gather(line, computations=without).kind == "all-gather"  # no FLOPs in either: 2 kB on the wire against 1 kB


# ---------------------------------------------------------------------------------------------------------------------
# Compiled programs


@functools.cache
def compiled() -> tuple[str, MeshOrder]:
    """Each kind of collective in a scan of 3 inside a scan of 2, over a (2, 2, 2) mesh."""
    mesh = jax.make_mesh((2, 2, 2), LAYOUT.axes, devices=jax.devices()[:8], axis_types=(AxisType.Auto,) * 3)

    def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        whole = lax.all_gather(x, ("data", "tensor"), axis=0, tiled=True)
        x = lax.psum_scatter(jnp.sin(whole), ("data", "tensor"), scatter_dimension=0, tiled=True)
        x = lax.ppermute(jnp.cos(x), "fsdp", [(0, 1), (1, 0)])
        return lax.all_to_all(jnp.sin(x), "tensor", 0, 0, tiled=True), None

    def outer(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x, _ = lax.scan(inner, x, length=3)
        return x, lax.psum(jnp.max(x), ("data", "fsdp", "tensor"))

    def region(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lax.scan(outer, x, length=2)

    spec = PartitionSpec(LAYOUT.axes)
    step = jax.jit(jax.shard_map(region, mesh=mesh, in_specs=spec, out_specs=(spec, PartitionSpec()), check_vma=True))
    text = step.lower(jax.ShapeDtypeStruct((8 * 128, 4), jnp.float32)).compile().as_text()
    return text, layout_of(mesh)


def test_a_compiled_program():
    text, layout = compiled()
    found = {(row.axes, row.kind): (row.calls, row.payload) for row in rows(text, layout)}
    shard = 128 * 4 * 4
    assert found == {
        ("data+tensor", "all-gather"): (6, 6 * 4 * shard),
        ("data+tensor", "reduce-scatter"): (6, 6 * 4 * shard),
        ("fsdp", "collective-permute"): (6, 6 * shard),
        ("tensor", "all-to-all"): (6, 6 * shard),
        ("data+fsdp+tensor", "all-reduce"): (2, 2 * 4),
    }
    assert set(layout.hosts) == {0}
