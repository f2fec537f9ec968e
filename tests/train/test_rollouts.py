"""Rollouts: the rows of answers, and whole runs of objective.kind=grpo on fake devices."""

import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxtrain.config import CheckpointConfig, DataSource, LoraConfig, MeshConfig, MoEConfig
from jaxtrain.config.objective_fields import GrpoConfig, ObjectiveConfig
from jaxtrain.config.objective_rules import objective_problems
from jaxtrain.data.tokenizers import load_tokenizer
from jaxtrain.errors import CheckpointError, DataError, ExplainedError, NumbersError
from jaxtrain.inference.engine import Sampling
from jaxtrain.mesh import make_mesh
from jaxtrain.objectives.grpo import ADVANTAGES, OLD, SAMPLER, WEIGHTS
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.train.answers import Answer, Answering
from jaxtrain.train.gradients import batch_names, make_loss_and_gradients
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.rewards import Scores
from jaxtrain.train.rollouts import Rollouts, answer_seed, places_of, rows_of, usable, weighed
from jaxtrain.train.sampler_limits import SamplerLimits
from jaxtrain.train.state import initial_params
from jaxtrain.train.stop import StopOnSignal
from jaxtrain.train.trainer import Trainer
from tests.launch.processes import started, wait_for_line
from tests.tiny import tiny
from tests.train.runs import Said

REWARD = """
def reward(prompts, completions, rows):
    return [float(sum(c.encode()) % 7) + float(row["answer"]) for c, row in zip(completions, rows)]
"""
MOE = {"num_layers": 3, "moe": MoEConfig(num_experts=8, mlp_dim=16, first_dense_layers=1, balance_loss=0.1)}
FOUR_MESHES = [{"fsdp": 4, "tensor": 2}, {"pipe": 2, "fsdp": 4}, {"context": 2, "fsdp": 4}, {"data": 2, "fsdp": 4}]


def on(**mesh):
    return MeshConfig(**({"fsdp": 1} | mesh))


@pytest.fixture
def files(tmp_path):
    """A reward function and prompts, some of which are held out."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [json.dumps({"prompt": f"{i:02d}", "answer": str(i % 3)}) for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    return tmp_path


def config_of(files, name="run", updates=1, steps=4, mesh=None, **more):
    settings = {"group_size": 4, "max_new_tokens": 6, "updates": updates, "packing": False} | more.pop("grpo", {})
    grpo = GrpoConfig(reward=str(files / "reward.py"), **settings)
    train = {"steps": steps, "global_batch_size": 16, "log_every": 1, "validate_every": 0} | more.pop("train", {})
    return tiny(
        name=name,
        run_dir=str(files / name),
        mesh=on(**(mesh or {"data": 8})),
        model={"vocab_size": 260, "num_layers": 2} | more.pop("model", {}),
        data={
            "sources": (DataSource(kind="chat", path=str(files / "prompts.jsonl")),),
            "sequence_length": 16,
            "validation_fraction": 0.2,
            "cache_dir": str(files / "cache"),
        },
        objective=ObjectiveConfig(kind="grpo", grpo=grpo),
        train=train,
        checkpoint=CheckpointConfig(every=1),
        optimizer={"peak_lr": 1e-2, "schedule": "constant"},
        **more,
    )


def trained(config, stop=None):
    trainer = Trainer(config)
    trainer.ended = trainer.train(stop=stop)
    return trainer


def rows(config):
    return [row for row in read_rows(config.directory / "metrics.jsonl") if "loss" in row]


def bits(trainer):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trainer.state)]


# --- rows


def test_an_answer_is_one_row_after_its_prompt():
    asked = [SimpleNamespace(ids=[7, 8], row={}), SimpleNamespace(ids=[9], row={})]
    answers = [Answer([1, 2, 3], [-0.1, -0.2, -0.3], True), Answer([4], [-0.4], False)]
    batch = rows_of(asked, answers, 5)
    assert batch["tokens"].tolist() == [[7, 8, 1, 2, 0], [9, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[-1, 1, 2, 3, -1], [4, -1, -1, -1, -1]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0], [0, 0, 0, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    np.testing.assert_allclose(batch[SAMPLER], [[0, -0.1, -0.2, -0.3, 0], [-0.4, 0, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo"])
def test_weights_are_shares_of_the_whole_batch(advantage):
    grpo = GrpoConfig(group_size=2, max_new_tokens=3, advantage=advantage)
    config = tiny(objective=ObjectiveConfig(kind="grpo", grpo=grpo))
    asked = [SimpleNamespace(ids=[7], row={})] * 2
    batch = rows_of(asked, [Answer([1, 2, 3], [0.0] * 3, True), Answer([4], [0.0], True)], 4)
    found = weighed(batch, Scores(np.array([[1.0, 0.0]], np.float32), (), 0.0), config)
    expected = {"grpo": [[1 / 6] * 3, [1 / 2]], "dr_grpo": [[1 / 6] * 3, [1 / 6]], "rloo": [[1 / 4] * 3, [1 / 4]]}[advantage]
    np.testing.assert_allclose(found[WEIGHTS], [[*expected[0], 0], [*expected[1], 0, 0, 0]], rtol=1e-6)
    assert np.sign(found[ADVANTAGES]).tolist() == [[1, 1, 1, 0], [-1, 0, 0, 0]]
    assert np.isnan(found[OLD]).all()


def test_prompts_without_room_for_an_answer_are_left_out():
    prompts = [SimpleNamespace(ids=[1] * n, row={}) for n in (2, 11, 12)]
    config = tiny(data={"sequence_length": 16}, objective=ObjectiveConfig(kind="grpo", grpo=GrpoConfig(max_new_tokens=6)))
    assert usable(_Numbered(prompts), config) == [0, 1]
    with pytest.raises(DataError, match="none of 1 prompts has 1 to 11 tokens.*the shortest has 12"):
        usable(_Numbered(prompts[2:]), config)


class _Numbered(list):
    @property
    def count(self):
        return len(self)


def test_seeds_differ_by_run_rollout_and_answer():
    seeds = {answer_seed(seed, rollout, answer) for seed in range(3) for rollout in range(10) for answer in range(10)}
    assert len(seeds) == 300


# --- without a device


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"moe": MoEConfig(num_experts=4, dispatch="capacity")}}, "drops tokens in training that sampling has kept"),
        ({"checkpoint": CheckpointConfig(every=4, fast_every=3)}, "fast_every=3 is not a multiple of objective.grpo.updates=2"),
        ({"guard": {"non_finite": "rollback"}}, "rollback leaves batches out, but objective.grpo.updates=2 of them share"),
        ({"train": {"global_batch_size": 18}}, "train.global_batch_size=18 is not a multiple of objective.grpo.group_size=4"),
    ],
)
def test_settings_that_rollouts_cannot_have(files, sections, words):
    config = config_of(files, updates=2)
    changed = {n: replace(getattr(config, n), **v) if isinstance(v, dict) else v for n, v in sections.items()}
    assert any(words in problem for problem in objective_problems(replace(config, **changed)))


def judged(files, on_reward_error):
    """What the reward function makes of two answers to two prompts."""
    config = config_of(files, grpo={"on_reward_error": on_reward_error})
    answering = Answering(SimpleNamespace(config=config, mesh=make_mesh(config.mesh)), load_tokenizer("byte"))
    asked = [SimpleNamespace(ids=[65 + i], row={"answer": "0"}) for i in range(2)]
    return answering.scores(asked, [[Answer([66, 256], [0.0, 0.0], True), Answer([67], [0.0], False)]] * 2)


def test_answers_reach_the_reward_function_as_text_without_their_end(files):
    (files / "reward.py").write_text("def reward(p, c, rows): return [float(p == ['A', 'A']), float(c == ['B', 'C'])]")
    assert judged(files, "stop").rewards.tolist() == [[1, 1], [0, 1]]


def test_a_reward_that_fails_stops_the_run_or_counts_zero(files):
    (files / "reward.py").write_text("def reward(prompts, completions, rows): raise OSError('no judge')")
    with pytest.raises(ExplainedError, match="failed in 2 of 2 calls, first with OSError: no judge.*on_reward_error=zero"):
        judged(files, "stop")
    scores = judged(files, "zero")
    assert not scores.rewards.any()
    assert len(scores.failures) == 2


@pytest.mark.parametrize(
    ("model", "measured", "words"),
    [
        ({}, {"sampler_difference": 0.06}, "0.06, above objective.grpo.max_sampler_difference=0.05. In float32 rounding is no"),
        ({"dtype": "bfloat16"}, {"sampler_outside": 0.3}, "max_sampler_outside=0.2. The likely cause is rounding in bfloat16"),
        ({"moe": MoEConfig(num_experts=4)}, {"sampler_kl": 0.1}, "max_sampler_kl=0.05. The likely cause is the router"),
    ],
)
def test_a_sampler_that_differs_stops_the_run(model, measured, words):
    limits = SamplerLimits(tiny(model=model, objective=ObjectiveConfig(kind="grpo", grpo=GrpoConfig(replay_routing=False))))
    fine = {"sampler_difference": 0.04, "sampler_outside": 0.1, "sampler_kl": 0.04}
    limits.metrics_read(1, fine)
    with pytest.raises(NumbersError, match=words):
        limits.metrics_read(2, fine | measured)


def test_a_lost_rollout_is_an_error_that_names_its_file(files):
    config = config_of(files, updates=2)
    config.directory.mkdir()
    with pytest.raises(CheckpointError, match="step 3 lies between the 2 updates on a rollout, and .*3.npz cannot be read"):
        Rollouts(SimpleNamespace(config=config, mesh=None), SimpleNamespace(), _Numbered([SimpleNamespace(ids=[1])]), 3, Said())


# --- runs


def test_sampling_agrees_with_training_and_held_out_prompts_are_validated(files):
    config = config_of(
        files,
        steps=2,
        mesh={"fsdp": 4, "tensor": 2},
        train={"microbatches": 2, "validate_every": 2},
        grpo={"kl": 0.1, "temperature": 0.7, "packing": True},
        lora=LoraConfig(rank=2),  # the reference has the state's own frozen weights
    )
    trainer = trained(config)
    divergence = [row["kl"] for row in rows(config)]
    assert abs(divergence[0]) < 1e-9, "the reference is not the weights that the run began with"
    assert divergence[1] > 1e-6
    for row in rows(config):
        assert row["ratio_change"] == 0
        assert row["sampler_difference"] < 1e-6
        assert row["reward_std"] > 0
        assert row["row_share"] == 0.5
        assert row["fill"] > 0.5
    held_out = [row for row in read_rows(config.directory / "metrics.jsonl") if "validation_reward" in row]
    assert [row["step"] for row in held_out] == [2]
    assert 0 < held_out[0]["validation_response_length"] <= 6
    assert trainer.metrics["validation_reward"].tolist() == [trainer.evaluate()["validation_reward"]]


def made_up():
    """Prompts, answers and scores."""
    asked = [SimpleNamespace(ids=[65, 66 + i], row={}) for i in range(16)]
    answers = [Answer([70 + i] * (i % 7), [-5.0] * (i % 7), True) for i in range(16)]
    return asked, answers, Scores(np.arange(16, dtype=np.float32).reshape(4, 4) ** 2, (), 0.0)


def step_on_answers(files, microbatches):
    """Loss, metrics, reports and gradients of a batch of made-up answers; in some microbatches no answer, or few tokens."""
    config = config_of(files, mesh={"data": 1}, train={"microbatches": microbatches})
    asked, answers, scores = made_up()
    rows = weighed(rows_of(asked, answers, 16), scores, config)
    rows["targets"][:4] = -1
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    step = jax.jit(make_loss_and_gradients(config, mesh, "reference"))
    return step(initial_params(config), {name: rows[name] for name in batch_names(config)})


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo"])
def test_packed_rows_hold_the_same_answers(files, advantage):
    config = config_of(files, grpo={"packing": True, "advantage": advantage}, mesh={"data": 1})
    asked, answers, scores = made_up()
    padded = weighed(rows_of(asked, answers, 16), scores, config)
    packed = weighed(rows_of(asked, answers, 16, places_of(asked, answers, config)), scores, config)
    assert packed["targets"].shape == (4, 16)
    for batch in (padded, packed):
        starts = np.nonzero(np.diff(batch["segments"], axis=1, prepend=0) * (batch["segments"] > 0))
        assert (batch["positions"][starts] == 0).all()
        assert len(starts[0]) == 16
    for name in ("tokens", "targets", "positions", SAMPLER, WEIGHTS, ADVANTAGES):
        of_answer = [[batch[name][batch["answer"] == i].tolist() for i in range(16)] for batch in (padded, packed)]
        assert of_answer[0] == of_answer[1], name


def step_on_mesh(files, mesh, packing):
    """Metrics and gradients of a batch of sampled answers on a mesh; no balance loss, which is of rows."""
    model = {"num_layers": 3, "moe": replace(MOE["moe"], balance_loss=0.0)} if "expert" in mesh else {}
    config = config_of(files, mesh=mesh, model=model, grpo={"packing": packing}, train={"microbatches": 2})
    prepared = Prepared(config)
    params, settings = prepared.create_state()["params"], [Sampling(1 + i % 6, temperature=1.0, seed=i) for i in range(16)]
    asked = [SimpleNamespace(ids=[65 + i % 3] * (1 + i % 4), row={}) for i in range(16)]
    answers = Answering(prepared, load_tokenizer("byte")).answers(params, asked, settings, lambda part: False)
    packed = places_of(asked, answers, config)
    rows = weighed(rows_of(asked, answers, 16, packed), made_up()[2], config)
    prepared = prepared.of_rows(packed[0])
    step = jax.jit(make_loss_and_gradients(prepared.config, prepared.mesh, prepared.backend))
    metrics, _, gradients = step(params, prepared.place(rows))
    return packed[0], metrics, gradients


PACKED_MESHES = [{"pipe": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "context": 4}, {"data": 2, "expert": 2, "tensor": 2}]


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, *(pytest.param(m, marks=pytest.mark.slow) for m in PACKED_MESHES)])
def test_packed_answers_give_the_loss_and_gradients_of_padded_ones(files, mesh):
    (many, padded, wanted), (few, packed, found) = (step_on_mesh(files, mesh, packing) for packing in (False, True))
    assert (many, few) == (16, 8)
    for metrics in (padded, packed):
        assert metrics["ratio_change"] == 0
        assert metrics["sampler_difference"] < 1e-6
    assert abs(padded["loss"]) > 1e-3
    for name in ("loss", "total_loss", "targets"):
        np.testing.assert_allclose(packed[name], padded[name], rtol=1e-6, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("microbatches", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_microbatches_change_neither_loss_nor_gradients(files, microbatches):
    whole, parts = step_on_answers(files, 1), step_on_answers(files, microbatches)
    assert abs(whole[0]["loss"]) > 1e-3
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_microbatches_change_neither_rewards_nor_losses_of_a_run(files):
    counts, mesh = (1, 2, 4), {"fsdp": 4, "tensor": 2}
    runs = [config_of(files, f"run_{n}", steps=3, mesh=mesh, train={"microbatches": n}) for n in counts]
    for config in runs:
        trained(config)
    for config in runs[1:]:
        for row, one in zip(rows(config), rows(runs[0]), strict=True):
            assert row["reward"] == one["reward"]
            assert row["loss"] == pytest.approx(one["loss"], abs=1e-6)
            assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", FOUR_MESHES, ids=lambda mesh: "-".join(mesh))
def test_the_layout_changes_neither_answers_nor_steps(files, mesh):
    alone = config_of(files, "alone", steps=2)
    other = config_of(files, "other", steps=2, mesh=mesh, grpo={"packing": True})
    trained(alone)
    trained(other)
    for row, one in zip(rows(other), rows(alone), strict=True):
        assert row["ratio_change"] == 0
        assert row["sampler_difference"] < 1e-6
        assert row["reward"] == one["reward"]
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*FOUR_MESHES, {"data": 2, "expert": 4}], ids=lambda mesh: "-".join(mesh))
def test_sampling_agrees_with_training_in_bfloat16(files, mesh):
    model = {"dtype": "bfloat16"} | (MOE if "expert" in mesh else {})
    config = config_of(files, steps=2, mesh=mesh, model=model)
    trained(config)
    for row in rows(config):
        assert row["ratio_change"] == 0
        assert row["sampler_difference"] < 2e-3


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_ends_between_updates_and_in_a_rollout_goes_on_to_the_same_bits(files, packing):
    whole = trained(config_of(files, "whole", updates=2, grpo={"packing": packing}))
    assert [row["ratio_change"] == 0 for row in rows(whole.config)] == [True, False, True, False]
    config = config_of(files, "broken", updates=2, grpo={"packing": packing})
    ended = trained(config, StopAfter(1)).ended
    assert (ended.step, ended.exit_code) == (1, 76)
    assert [path.name for path in (config.directory / "rollouts").glob("*")] == ["1.npz"]
    in_rollout = StopInRollout(1)
    assert trained(config, in_rollout).ended.step == 2
    assert in_rollout.received == signal.SIGTERM
    again = trained(config)
    assert bits(again) == bits(whole)
    same = ("step", "loss", "reward", "ratio_change", "grad_norm", "sampler_difference", "entropy")
    assert [[row[name] for name in same] for row in rows(config)] == [
        [row[name] for name in same] for row in rows(whole.config)
    ]
    texts = [(run.config.directory / "rollouts.jsonl").read_text() for run in (whole, again)]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 8


class StopAfter(StopOnSignal):
    """As if SIGTERM had come at the end of a step."""

    def __init__(self, step):
        super().__init__(Said())
        self.last = step

    def stop_reason(self):
        if self._step == self.last:
            self.received = signal.SIGTERM
        return super().stop_reason()


class StopInRollout(StopOnSignal):
    """As if SIGTERM had come while a rollout's answers were made."""

    def __init__(self, rollout):
        super().__init__(Said())
        self.rollout = rollout

    def ends_before(self, what, part):
        if (what, part) == (f"rollout {self.rollout}", 1):
            self.received = signal.SIGTERM
        return super().ends_before(what, part)


# --- experts

MOE_MESHES = [
    {"data": 2, "expert": 2, "tensor": 2},
    pytest.param({"data": 8}, marks=pytest.mark.slow),
    pytest.param({"expert": 4, "context": 2}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "expert": 4}, marks=pytest.mark.slow),
    pytest.param({"pipe": 2, "expert": 4}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh", MOE_MESHES, ids=lambda mesh: "-".join(mesh))
def test_the_experts_of_sampling_are_those_of_training(files, mesh):
    """Loss and gradients with the experts that the sampler kept equal those with the router's own (-1)."""
    config = config_of(files, mesh=mesh, model=MOE, train={"microbatches": 2})
    prepared = Prepared(config)
    params, settings = prepared.create_state()["params"], [Sampling(6, temperature=1.0, seed=i) for i in range(16)]
    asked = [SimpleNamespace(ids=[65 + i % 3] * (1 + i % 4), row={}) for i in range(16)]
    answers = Answering(prepared, load_tokenizer("byte")).answers(params, asked, settings, lambda part: False)
    assert {len(np.unique(a.experts)) for a in answers} > {8}
    given = weighed(rows_of(asked, answers, 16), Scores(np.arange(16, dtype=np.float32).reshape(4, 4), (), 0.0), config)
    kept = given["experts"]
    assert ((kept >= 0).all(-1) == (given["segments"] > 0)).all()
    step = jax.jit(make_loss_and_gradients(config, prepared.mesh, prepared.backend))
    found, own, other = (step(params, prepared.place(given | {"experts": e})) for e in (kept, kept * 0 - 1, (kept + 1) % 8))
    assert found[0]["ratio_change"] == 0
    assert found[0]["sampler_difference"] < 1e-6
    assert other[0]["sampler_difference"] > 1e-4
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert (found[1]["expert_load"] != other[1]["expert_load"]).any()


@pytest.mark.slow
def test_the_experts_of_a_rollout_stay_through_its_updates(files):
    config = config_of(files, updates=2, steps=2, model=MOE)
    trainer = trained(config)
    assert [row["ratio_change"] == 0 for row in rows(config)] == [True, False]
    assert rows(config)[0]["sampler_difference"] < 1e-6
    assert trainer.ended.step == 2


# --- processes


def arguments(files, name):
    """The flags of a run like `config_of`, with two updates a rollout."""
    flags = {
        "config": "configs/quickstart.py",
        "run_dir": files / name,
        "model.num_layers": 2,
        "model.embed_dim": 16,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
        "model.head_dim": 8,
        "model.mlp_dim": 16,
        "model.vocab_size": 260,
        "model.dtype": "float32",
        "data.sources.0.kind": "chat",
        "data.sources.0.path": files / "prompts.jsonl",
        "data.tokenizer": "byte",
        "data.sequence_length": 16,
        "data.validation_fraction": 0.2,
        "data.cache_dir": files / "cache",
        "objective.kind": "grpo",
        "objective.grpo.reward": files / "reward.py",
        "objective.grpo.group_size": 4,
        "objective.grpo.max_new_tokens": 6,
        "objective.grpo.updates": 2,
        "optimizer.peak_lr": 0.01,
        "train.steps": 6,
        "train.global_batch_size": 16,
        "train.log_every": 1,
        "train.validate_every": 3,
        "train.compilation_cache": "",
        "train.sample_tokens": 0,
        "checkpoint.every": 1,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.mark.slow
def test_two_processes_give_the_same_as_one_and_a_killed_one_goes_on_to_the_same(files, tmp_path):
    for name, count, devices in (("one", 1, 4), ("two", 2, 2)):
        (tmp_path / name).mkdir()
        with started(count, devices, arguments(files, f"run_{name}"), tmp_path / name) as running:
            assert [process.wait(300) for process in running] == [0] * count, (tmp_path / name / "0.log").read_text()[-3000:]
    (tmp_path / "killed").mkdir()
    for words in ("step 1/6", "step 4/6"):
        with started(2, 2, arguments(files, "run_killed"), tmp_path / "killed") as running:
            wait_for_line(tmp_path / "killed" / "0.log", words)
            running[1].kill()
            running[0].wait(120)
    with started(2, 2, arguments(files, "run_killed"), tmp_path / "killed") as running:
        assert [process.wait(300) for process in running] == [0, 0], (tmp_path / "killed" / "0.log").read_text()[-3000:]
    logged = {name: read_rows(files / f"run_{name}" / "metrics.jsonl") for name in ("one", "two", "killed")}
    figures = {name: [[row.get(key) for key in SAME] for row in found] for name, found in logged.items()}
    assert figures["killed"] == figures["two"]
    for two, one in zip(figures["two"], figures["one"], strict=True):  # gloo sums in another order
        assert [value for value in two if value] == pytest.approx([value for value in one if value], rel=1e-4)


FATAL = """
import os, pathlib
inner, calls, kill = reward, 0, pathlib.Path(__file__).with_name("kill")

def reward(prompts, completions, rows):
    global calls
    calls += 1
    if calls == 6 and kill.exists():  # the second of four groups of the second rollout
        kill.unlink()
        os.kill(os.getpid(), 9)
    return inner(prompts, completions, rows)
"""


@pytest.mark.slow
def test_a_process_killed_in_a_rollout_makes_it_again_to_the_same_bits(files, tmp_path):
    (files / "reward.py").write_text(REWARD + FATAL)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        for code in (-signal.SIGKILL, 0) if name == "killed" else (0,):
            if code:
                (files / "kill").touch()
            with started(1, 4, arguments(files, f"run_{name}"), tmp_path / name) as running:
                assert running[0].wait(300) == code, (tmp_path / name / "0.log").read_text()[-3000:]
    texts = [(files / f"run_{name}" / "rollouts.jsonl").read_text() for name in ("whole", "killed")]
    assert texts[0] == texts[1]
    whole, killed = (read_rows(files / f"run_{name}" / "metrics.jsonl") for name in ("whole", "killed"))
    assert [[row.get(key) for key in SAME] for row in killed] == [[row.get(key) for key in SAME] for row in whole]


SAME = ("step", "loss", "reward", "ratio_change", "grad_norm", "validation_reward", "entropy")
