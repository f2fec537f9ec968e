"""Find the best layout of a model on a cluster: search, verify the best few, explain, and count the cost."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from jaxtrain.config import MESH_AXES, Config, MeshConfig, PipelineConfig
from jaxtrain.config.rules import validate
from jaxtrain.hardware import load_chip
from jaxtrain.ops.float8_choice import choose_matmuls
from jaxtrain.parts import plugged
from jaxtrain.planner.answer import Plan, make_bill
from jaxtrain.planner.estimates import Cluster
from jaxtrain.planner.other_models import left_out
from jaxtrain.planner.search import Objective, search
from jaxtrain.planner.stages import longest_stage, of_whole_run, stage_words
from jaxtrain.planner.verify import choose_count, verify
from jaxtrain.planner.words import explain_plan

MOST_SHOWN = 10


def check_model(config: Config) -> None:
    """Raise ConfigError for problems that no layout can mend: those of the config on one device."""
    mesh = MeshConfig(**dict.fromkeys(MESH_AXES, 1))
    train, sync = dataclasses.replace(config.train, microbatches=1), dataclasses.replace(config.sync, mode="every_step")
    validate(dataclasses.replace(config, mesh=mesh, train=train, sync=sync, pipeline=PipelineConfig()), 1)


def plan(
    config: Config,
    hardware: str = "h100-sxm",
    hosts: int = 1,
    devices_per_host: int = 8,
    objective: Objective = "time",
    verified: int | None = 0,
) -> Plan:
    """Return the best layouts of a config on `hosts` of `devices_per_host` chips each (`make_plan`).

    Args:
      hardware: a chip by name, or a chip file.

    Raises:
      ExplainedError: there is no such chip.
    """
    return make_plan(config, Cluster(load_chip(hardware), hosts, devices_per_host), objective, verified)


def make_plan(
    config: Config,
    cluster: Cluster,
    objective: Objective = "time",
    verified: int | None = None,
    tokens: float = 0,
    days: float = 0,
    price_per_gpu_hour: float = 0,
    tell: Callable[[str], None] = lambda words: None,
) -> Plan:
    """Return the best layouts of a config on a cluster; if none fits, `words` say what would.

    Args:
      verified: how many of the best to compile and rank again; None: a few if this machine can compile for the chip.
      tokens, days, price_per_gpu_hour: see `make_bill`.
      tell: called with progress lines.

    Raises:
      ConfigError: the config is wrong whatever the layout.
    """
    check_model(config)
    config, matmuls = choose_matmuls(config, cluster.chip)
    if matmuls:
        tell(f"matmuls in {matmuls}")
    whole = config
    if config.train.stages:
        tell(stage_words(config, longest_stage(config)))
        config = longest_stage(config).config
    count, basis = choose_count(cluster.chip, verified)
    tell(basis)
    if own := plugged(config.model.parts) | ({"optimizer": 0} if config.parts.optimizer is not None else {}):
        tell(
            f"plugged in: {', '.join(own)}; estimates count the decoder's own parts and config section optimizer, and only "
            "layouts that are compiled (--verify) count yours"
        )
    if missing := left_out(config):
        tell(f"objective.kind={config.objective.kind}: estimates leave out {missing}")
    look = functools.partial(search, objective=objective)
    found = look(config, cluster)
    tell(f"{found.candidates:,} layouts in {found.seconds:.1f} s")
    ranked = found.ranked
    if whole is not config and ranked:
        ranked = tuple(each for each in ranked if of_whole_run(whole, each.config))
        tell(f"{len(ranked)} of the best {len(found.ranked)} layouts suit all stages")
    if ranked and count:
        ranked = tuple(verify(ranked, count, objective=objective))
    words = explain_plan(config, cluster, objective, found, ranked, look)
    bill = make_bill(ranked[0], tokens, days, price_per_gpu_hour) if ranked else None
    return Plan(config, cluster, objective, found, ranked[:MOST_SHOWN], words, bill)
