"""Compare published Llama training runs on GPUs with `planner.cost`'s estimates of the same layouts.

    python -m tests.planner.published

Runs are in bfloat16 (this trainer has no float8), at the published mesh, batch and recomputation, on the published chip and
network, and under what the source says that its program hides (`cost.Practice`). Throughput is in tokens/s a GPU; where a
source gives TFLOP/s, its own convention turns it into tokens: all of these count the whole square of attention ("full" in
`telemetry.flops`; MaxText did until July 2025, and 460.48 TFLOP/s beside 1,035.97 tokens/s in NVIDIA's log of it agree with
that).

The planner ranks layouts by the memory and overlap of *this* trainer. This is why it may rank a published layout low: Megatron
shards its optimizer over data and context together, and sums gradients in the matmul; the Llama 3 report keeps all
activations of 1F1B without the second set that a lock-step pipeline holds (`parallel/pipeline_schedule.py`).

One constant is fitted to them, `roofline.CEILING`, so that the median error is zero.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtrain.config import (
    Config,
    DataConfig,
    DataSource,
    MeshConfig,
    ModelConfig,
    PipelineConfig,
    ShardingConfig,
    TrainConfig,
)
from jaxtrain.config.rules import validate
from jaxtrain.hardware import Chip, find_chip
from jaxtrain.planner.candidate import layout_of
from jaxtrain.planner.cost import OURS, CostModel, Practice
from jaxtrain.planner.estimates import Cluster, Estimate
from jaxtrain.planner.search import search
from jaxtrain.telemetry.flops import model_flops_per_token

_LLAMA3 = {"vocab_size": 128256, "num_kv_heads": 8, "rope_theta": 500_000.0}
MODELS = {
    "llama-2-7b": ModelConfig(32, 4096, 32, 32, 128, 11008, 32000),
    "llama-2-70b": ModelConfig(80, 8192, 64, 8, 128, 28672, 32000),
    "llama-3-8b": ModelConfig(num_layers=32, embed_dim=4096, num_heads=32, head_dim=128, mlp_dim=14336, **_LLAMA3),
    "llama-3-70b": ModelConfig(num_layers=80, embed_dim=8192, num_heads=64, head_dim=128, mlp_dim=28672, **_LLAMA3),
    "llama-3-405b": ModelConfig(num_layers=126, embed_dim=16384, num_heads=128, head_dim=128, mlp_dim=53248, **_LLAMA3),
}
MODELS["llama-3-405b of 128 stages"] = replace(MODELS["llama-3-405b"], num_layers=128)

MAXTEXT = "MaxText, MaxText/configs/a3/llama_2_7b/README.md and {1,2,16}vm.sh (github.com/AI-Hypercomputer/maxtext, 2024)"
DGXC = "NVIDIA dgxc-benchmarking, {} (github.com/NVIDIA/dgxc-benchmarking, 25.01)"
TITAN = "torchtitan, {} (github.com/pytorch/torchtitan)"
LLAMA = "The Llama 3 Herd of Models, table 4 (arXiv:2407.21783)"


@dataclass(frozen=True)
class PublishedRun:
    """One published run."""

    program: str
    source: str
    model: str
    chip: Chip
    mesh: MeshConfig
    batch: int
    """Sequences per step."""
    length: int
    tokens: float
    """Published tokens/s per GPU."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Other fields of `train`, `pipeline` and `sharding`, by name."""
    practice: Practice = OURS
    note: str = ""
    """Assumptions."""

    @property
    def devices(self) -> int:
        """Number of GPUs."""
        size = 1
        for n in self.mesh.shape:
            size *= n
        return size

    @property
    def cluster(self) -> Cluster:
        """The cluster, of hosts with eight GPUs."""
        return Cluster(self.chip, self.devices // 8)

    def config(self) -> Config:
        """Return the run as a config of this trainer."""
        sections = {
            "train": TrainConfig(global_batch_size=self.batch),
            "pipeline": PipelineConfig(),
            "sharding": ShardingConfig(),
        }
        for name, value in self.options.items():
            section = next(s for s in sections if name in {f.name for f in dataclasses.fields(sections[s])})
            sections[section] = replace(sections[section], **{name: value})
        data = DataConfig(sources=(DataSource(kind="synthetic"),), sequence_length=self.length, mask_documents=False)
        config = Config(name="published", model=MODELS[self.model], mesh=self.mesh, data=data, **sections)
        return validate(config, self.devices)

    def estimate(self) -> Estimate:
        """Return the planner's estimate of the run."""
        config = self.config()
        return CostModel(config, self.cluster, self.practice).estimate(layout_of(config))

    @property
    def predicted(self) -> float:
        """Predicted tokens/s per GPU."""
        return self.estimate().tokens_per_second / self.devices

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        return self.predicted / self.tokens - 1


def _tokens(model: str, length: int, teraflops: float) -> float:
    """Return tokens/s from TFLOP/s that count the whole square of attention."""
    return teraflops * 1e12 / model_flops_per_token(MODELS[model], length, "full")


def _seconds(batch: int, length: int, devices: int, seconds: float) -> float:
    return batch * length / devices / seconds


H100 = find_chip("h100-sxm")
A3_HIGH = replace(H100, name="h100-a3-high", based_on="h100-sxm", nic_bandwidth=12.5e9)
"""Google Cloud A3 High: four NICs of 200 Gb/s for eight GPUs."""
H100_500W = replace(
    H100,
    name="h100-500w",
    based_on="h100-sxm",
    memory_bandwidth=2400e9,
    memory_bytes=96_000_000_000,
    watts=500,
    peak_flops={name: rate * (500 / 700) ** (1 / 3) for name, rate in H100.peak_flops.items()},
)
"""Meta's Grand Teton at 500 W, HBM2e of 2.4 TB/s. Its clock under load is not stated: power goes with the cube of the clock."""

_HIDES_DATA = Practice(hides_gradients=True)
_MEGATRON = Practice(hides_tensor=True, hides_gradients=True, fuses_accumulation=True)


def _maxtext(hosts: int, teraflops: float) -> PublishedRun:
    mesh, batch = MeshConfig(data=hosts, fsdp=8), 32 * hosts
    options = {"remat": "named", "remat_save": ("query", "key", "value", "attention", "attention_out", "mlp_gate", "mlp_up")}
    note = "remat minimal_flash keeps all matmuls and attention; gradients summed in bfloat16"
    options |= {"reduce_dtype": "bfloat16", "loss_chunk": 4096}
    tokens = _tokens("llama-2-7b", 4096, teraflops)
    return PublishedRun("MaxText", MAXTEXT, "llama-2-7b", A3_HIGH, mesh, batch, 4096, tokens, options, note=note)


def _maxtext_70b(devices: int, fsdp: int, seconds: float) -> PublishedRun:
    options = {"remat": "named", "remat_save": ("query", "key", "value"), "reduce_dtype": "bfloat16", "loss_chunk": 4096}
    mesh, batch = MeshConfig(data=devices // fsdp, fsdp=fsdp), 2 * devices
    source, tokens = DGXC.format("maxtext/README_70b.md and configure.sh"), _seconds(batch, 4096, devices, seconds)
    return PublishedRun("MaxText", source, "llama-2-70b", H100, mesh, batch, 4096, tokens, options, _HIDES_DATA)


def _nemo(
    size: str, devices: int, mesh: MeshConfig, batch: int, microbatches: int, chunks: int, seconds: float
) -> PublishedRun:
    options = {"remat": "none", "zero": 1, "microbatches": microbatches, "loss_chunk": 8192, "context_attention": "ring"}
    if chunks > 1:
        options |= {"schedule": "interleaved", "chunks": chunks}
    source, tokens = DGXC.format(f"llama3.1/README_{size}.md, NeMo 24.09"), _seconds(batch, 8192, devices, seconds)
    return PublishedRun("Megatron-LM (NeMo)", source, f"llama-3-{size}", H100, mesh, batch, 8192, tokens, options, _MEGATRON)


def _titan(size: str, chip: Chip, mesh: MeshConfig, rows: int, remat: str, tokens: float, file: str) -> PublishedRun:
    saved = {"remat": "full"} if remat == "full" else {"remat": "named", "remat_save": _SELECTIVE}
    options = saved | {"reduce_dtype": "float32", "loss_chunk": 8192, "take_turns": False}
    practice = Practice(attention_share=1.0 if chip.name.startswith("a100") else 0.62)
    note = "" if remat == "full" else "selective op: every second matmul is kept"
    batch = rows * mesh.data * mesh.fsdp
    return PublishedRun(
        "torchtitan", TITAN.format(file), f"llama-3-{size}", chip, mesh, batch, 8192, tokens, options, practice, note
    )


_SELECTIVE = ("query", "value", "attention", "mlp_gate")


def _report(devices: int, teraflops: float) -> PublishedRun:
    mesh = MeshConfig(pipe=16, fsdp=devices // 128, tensor=8)
    options = {"remat": "none", "zero": 1, "microbatches": 2048 // mesh.fsdp, "schedule": "interleaved", "chunks": 8}
    options |= {"reduce_dtype": "float32", "loss_chunk": 8192}
    note = "128 virtual stages, of which the first holds the embedding alone and the last the head: timed as 128 layers"
    tokens = _tokens("llama-3-405b", 8192, teraflops)
    return PublishedRun(
        "Llama 3 report", LLAMA, "llama-3-405b of 128 stages", H100, mesh, 2048, 8192, tokens, options, _HIDES_DATA, note
    )


RUNS: tuple[PublishedRun, ...] = (
    *(_maxtext(hosts, rate) for hosts, rate in ((1, 492), (2, 422), (4, 407), (8, 409), (16, 375))),
    *(_maxtext_70b(n, f, s) for n, f, s in ((64, 64, 6.999), (256, 256, 7.153), (512, 128, 7.091), (2048, 128, 7.066))),
    *(_nemo("8b", n, MeshConfig(fsdp=n // 2, context=2), 16 * n, 32, 1, s) for n, s in ((8, 12.91), (32, 13.05), (128, 13.10))),
    *(
        _nemo("70b", n, MeshConfig(pipe=4, fsdp=n // 32, context=2, tensor=4), 2 * n, 64, 5, s)
        for n, s in ((64, 14.72), (512, 14.89), (2048, 14.98))
    ),
    *(
        _nemo("405b", n, MeshConfig(pipe=9, fsdp=n // 144, context=2, tensor=8), n * 252 // 576, 63, 7, s)
        for n, s in ((576, 17.20), (1152, 17.52), (2304, 17.62))
    ),
    _titan("8b", H100_500W, MeshConfig(fsdp=8), 2, "selective", 6667, "benchmarks/llama3_h100_202412_torchtitan.md"),
    _titan("8b", H100_500W, MeshConfig(fsdp=128), 2, "selective", 6514, "benchmarks/llama3_h100_202412_torchtitan.md"),
    _titan("8b", find_chip("a100-80"), MeshConfig(fsdp=64), 1, "selective", 2973, "docs/performance.md, 2024"),
    _titan("70b", find_chip("a100-80"), MeshConfig(fsdp=64), 1, "full", 331, "docs/performance.md, 2024"),
    _titan("405b", H100_500W, MeshConfig(fsdp=16, tensor=8), 2, "full", 109, "docs/performance.md, 2024"),
    _report(8192, 430),
    _report(16384, 400),
)
"""All published runs."""


def table(runs: Sequence[PublishedRun] = RUNS) -> str:
    """Return the runs as a Markdown table, with errors."""
    lines = ["| program | model | GPUs | mesh | published | predicted | error |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for run in runs:
        estimate = run.estimate()
        mesh = " x ".join(f"{axis}={n}" for axis, n in estimate.mesh.items())
        predicted = estimate.tokens_per_second / run.devices
        lines.append(
            f"| {run.program} | {run.model} | {run.devices} {run.chip.name} | {mesh} | {run.tokens:,.0f} | {predicted:,.0f} | "
            f"{predicted / run.tokens - 1:+.1%} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Ranking:
    """The place of a published layout in a search."""

    rank: int | None
    """Rank of its kind among all kinds, 1 the best; None if it is not ranked."""
    best: Estimate
    """The best layout of the search."""


def kind(mesh: MeshConfig) -> tuple[int, int, int, int]:
    """(stages, expert, context, tensor): what other trainers' meshes share with ours; the rest is data parallelism of some
    sort.
    """
    return mesh.pipe, mesh.expert, mesh.context, mesh.tensor


def find_place(run: PublishedRun, ranked: int = 60) -> Ranking:
    """Search for the best layout of a run's model, batch and cluster, with its program's overlap and this trainer's memory."""
    found = search(run.config(), run.cluster, ranked=ranked, practice=run.practice).ranked
    kinds = list(dict.fromkeys(kind(estimate.config.mesh) for estimate in found))
    return Ranking(kinds.index(kind(run.mesh)) + 1 if kind(run.mesh) in kinds else None, found[0])


def smallest_runs() -> list[PublishedRun]:
    """Return for each program, model and chip the run with the fewest GPUs; of the Llama 3 report both."""
    first: dict[tuple[str, ...], PublishedRun] = {}
    for run in RUNS:
        first.setdefault((run.program, run.model, run.chip.name, run.source if run.source != LLAMA else str(run.devices)), run)
    return list(first.values())


def places() -> str:
    """Return the planner's ranks of the published layouts as a Markdown table."""
    lines = ["| program | model | GPUs | published mesh | its rank | the planner's first | tokens/s a GPU |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for run in smallest_runs():
        place = find_place(run)
        own = " x ".join(f"{axis}={n}" for axis, n in run.estimate().mesh.items())
        best = " x ".join(f"{axis}={n}" for axis, n in place.best.mesh.items())
        tokens = place.best.tokens_per_second / run.devices
        lines.append(
            f"| {run.program} | {run.model} | {run.devices} {run.chip.name} | {own} | {place.rank or '-'} | {best}, "
            f"remat {place.best.config.train.remat} | {tokens:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, a summary of the errors, and the sources."""
    print(table())
    errors = [run.error for run in RUNS]
    worst = max(errors, key=abs)
    within = sum(abs(error) <= 0.2 for error in errors)
    print()
    print(places())
    print(f"\nmedian error {statistics.median(errors):+.1%}, worst {worst:+.1%}, {within} of {len(errors)} within 20%\n")
    for source in dict.fromkeys(run.source for run in RUNS):
        print(f"* {source}")
    for note in dict.fromkeys(f"{run.program}, {run.model}: {run.note}" for run in RUNS if run.note):
        print(f"* {note}")


if __name__ == "__main__":
    main()
