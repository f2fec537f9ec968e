"""Every field is a typed flag, written as people write it; what is wrong with a command line is told at once."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from jaxtrain.command import Usage, parse_config
from jaxtrain.command import parse as parse_line
from jaxtrain.config import (
    Config,
    DataConfig,
    DataSource,
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeScaling,
    Stage,
    TrainConfig,
    from_json,
    to_json,
)
from jaxtrain.config.names import PEERS, field_hint, field_names, nested, set_field
from jaxtrain.config.rules import find_problems
from jaxtrain.errors import EXIT_USAGE, ConfigError, UsageError
from jaxtrain.verbs.plan import USAGE, PlanFlags

CONFIGS = Path(__file__).parents[2] / "configs"


def parse(*arguments: str) -> Config:
    return parse_config(arguments)


def config_flag(tmp_path: Path, body: str = "return Config(name='mine')") -> str:
    """--config=FILE with this body of get_config."""
    path = tmp_path / "mine.py"
    path.write_text(f"from jaxtrain.config import *\n\ndef get_config():\n    {body}\n")
    return f"--config={path}"


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


def test_flags_override_the_file(tmp_path: Path):
    flag = config_flag(tmp_path, "return Config(mesh=MeshConfig(pipe=4), train=TrainConfig(steps=7, seed=3))")
    config = parse(
        flag, "--mesh.fsdp=8", "--train.steps", "9", "--model.tie_embeddings=True", "--train.remat_save", "key", "value"
    )
    given = {
        "mesh.pipe": 4,
        "mesh.fsdp": 8,
        "train.steps": 9,
        "train.seed": 3,
        "train.remat_save": ("key", "value"),
        "model.tie_embeddings": True,
    }
    expected = Config()
    for name, value in given.items():
        expected = set_field(expected, name, value)
    assert config == expected


def test_the_file_may_stand_anywhere_and_apart(tmp_path: Path):
    path = config_flag(tmp_path).removeprefix("--config=")
    assert parse("--run_dir=x", "--config", path) == Config(name="mine", run_dir="x")


def test_flags_of_nested_sources(tmp_path: Path):
    flag = config_flag(tmp_path)
    config = parse(flag, "--data.sources.0.kind=text", "--data.sources.0.path=books/*.txt", "--data.sources.1.weight=2")
    assert config.data.sources == (DataSource(kind="text", path="books/*.txt"), DataSource(weight=2.0))
    with pytest.raises(ConfigError, match=r"--data.sources.2.kind=text: there are 1 sources, so the next is sources.1"):
        parse(flag, "--data.sources.2.kind=text")


# (flags, field, value)
SPELLINGS = [
    (["--train.deterministic"], "train.deterministic", True),
    (["--train.deterministic", "True"], "train.deterministic", True),
    (["--train.deterministic=true"], "train.deterministic", True),
    (["--train.deterministic=1"], "train.deterministic", True),
    (["--train.deterministic=on"], "train.deterministic", True),
    (["--train.deterministic=Yes"], "train.deterministic", True),
    (["--no-data.mask_documents"], "data.mask_documents", False),
    (["--no-data.mask-documents"], "data.mask_documents", False),
    (["--data.mask_documents=false"], "data.mask_documents", False),
    (["--data.mask_documents=0"], "data.mask_documents", False),
    (["--data.mask_documents", "no"], "data.mask_documents", False),
    (["--data.mask_documents=OFF"], "data.mask_documents", False),
    (["--train.steps=1e3"], "train.steps", 1000),
    (["--train.steps=1_000"], "train.steps", 1000),
    (["--train.steps=1000.0"], "train.steps", 1000),
    (["--train.steps=1.5e3"], "train.steps", 1500),
    (["--train.global-batch-size=64"], "train.global_batch_size", 64),
    (["--train.seed=9007199254740993"], "train.seed", 9007199254740993),
    (["--mesh.data", "-1"], "mesh.data", -1),
    (["--optimizer.peak_lr=1"], "optimizer.peak_lr", 1.0),
    (["--optimizer.peak_lr=3e-4"], "optimizer.peak_lr", 3e-4),
    (["--sharding.zero=2"], "sharding.zero", 2),
    (["--run_dir="], "run_dir", ""),
    (["--name=a=b"], "name", "a=b"),
    (["--train.remat_save=attention,mlp_up"], "train.remat_save", ("attention", "mlp_up")),
    (["--train.remat_save", "attention, mlp_up"], "train.remat_save", ("attention", "mlp_up")),
    (["--train.remat_save", "attention", "mlp_up", "--train.steps=3"], "train.remat_save", ("attention", "mlp_up")),
    (["--train.remat_save="], "train.remat_save", ()),
    (["--train.remat_save"], "train.remat_save", ()),
    (["--train.xla_options=a=1,b=true"], "train.xla_options", ("a=1", "b=true")),
    (["--train.xla_options=a=FUSION,CUBLAS,b=2"], "train.xla_options", ("a=FUSION,CUBLAS", "b=2")),
    (["--train.steps=3", "--train.steps=4"], "train.steps", 4),
]


@pytest.mark.parametrize(("flags", "name", "value"), SPELLINGS, ids=[" ".join(flags) for flags, _, _ in SPELLINGS])
def test_what_people_write(flags: list[str], name: str, value: Any):
    found = value_of(parse(f"--config={CONFIGS / 'quickstart.py'}", *flags), name)
    assert found == value
    assert type(found) is type(value)


OPTIONAL = {"model.rope_scaling": RopeScaling, "model.latent_attention": LatentAttentionConfig, "model.moe": MoEConfig}


def test_every_field_is_a_flag():
    """Of optional parts too: the value of each field's default, written out, is read as that value."""
    names = list(field_names())
    assert {kind for name in OPTIONAL if (kind := nested(field_hint(name)))} == set(OPTIONAL.values())
    config = Config(
        model=ModelConfig(rope_scaling=RopeScaling(), latent_attention=LatentAttentionConfig(), moe=MoEConfig()),
        data=DataConfig(validation=(DataSource(),)),
        train=TrainConfig(stages=(Stage(rope_scaling=RopeScaling()),)),
    )
    written = {name: value_of(config, name) for name in names}
    flags = [f"--{name}={','.join(value) if isinstance(value, tuple) else value}" for name, value in written.items()]
    assert len(flags) > 120
    assert parse(f"--config={CONFIGS / 'quickstart.py'}", *flags) == config


@pytest.mark.parametrize("part", OPTIONAL)
def test_a_flag_of_a_part_that_is_none_makes_it(part: str, tmp_path: Path):
    kind, flag = OPTIONAL[part], config_flag(tmp_path, "return Config(model=ModelConfig(num_heads=8, num_kv_heads=8))")
    for field in dataclasses.fields(kind):
        value = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        assert value_of(parse(flag, f"--{part}.{field.name}={value}"), part) == kind()
    first = next(field for field in dataclasses.fields(kind) if isinstance(field.default, int | float))
    config = parse(flag, f"--{part}.{first.name}=16")
    assert value_of(config, part) == kind(**{first.name: 16})
    assert find_problems(config, 1)[1] == []
    assert from_json(to_json(config)) == config
    assert value_of(parse(flag, f"--{part}.{first.name}=16", f"--{part}=None"), part) is None
    with pytest.raises(ConfigError, match=f"--{part}=8: is None, or is set by its fields: {dataclasses.fields(kind)[0].name}"):
        parse(flag, f"--{part}=8")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--mesh.fdsp=8", "--mesh.fdsp=8: no such flag; did you mean --mesh.fsdp?"),
        ("--train.global_batchsize=8", "did you mean --train.global_batch_size?"),
        ("--optimizer.lr=8", "did you mean --optimizer.peak_lr?"),
        ("--lr=8", "did you mean --optimizer.peak_lr?"),
        ("--batch_size=8", "did you mean --train.global_batch_size?"),
        ("--seq-len=8", "did you mean --data.sequence_length?"),
        ("--train.max_steps=8", "did you mean --train.steps?"),
        ("--fsdp=8", "did you mean --mesh.fsdp?"),
        ("--kind=text", "or --data.sources.0.kind or --data.validation.0.kind?"),
        ("--model.num_experts=4", "did you mean --model.moe.num_experts?"),
        ("--hots=2", "did you mean --hosts?"),
        ("--mesh.xyzzy=2", "one of: --mesh.replica, --mesh.pipe,"),
        ("--xyzzy=2", "no such flag; --help lists all"),
        ("--mesh=2", "--mesh=2: is set by its fields: replica, pipe"),
        ("--data.sources=text", "is set by the fields of each"),
        ("--mesh.fsdp=two", "--mesh.fsdp=two: give a whole number"),
        ("--mesh.fsdp=1.5", "--mesh.fsdp=1.5: give a whole number"),
        ("--train.steps=1e999999999", "give a whole number"),
        ("--train.steps=inf", "give a whole number"),
        ("--train.steps", "--train.steps: has no value; write --train.steps=..."),
        ("--optimizer.peak_lr=fast", "--optimizer.peak_lr=fast: give a number"),
        ("--optimizer.name=adamv", "did you mean 'adamw'"),
        ("--model.norm_bias=perhaps", "--model.norm_bias=perhaps: give True or False"),
        ("--no-train.steps", "no such flag"),
        ("--objective.grpo.top_p=0.9", "a cut one is not the policy's"),
        ("train.steps=3", "train.steps=3: flags begin with --"),
        ("b.txt", "put a pattern"),
    ],
)
def test_a_wrong_flag_names_the_right_one(flag: str, words: str):
    with pytest.raises(ConfigError) as raised:
        parse_line(USAGE, [f"--config={CONFIGS / 'quickstart.py'}", flag])
    assert raised.value.exit_code == EXIT_USAGE
    assert len(raised.value.problems) == 1
    assert words in raised.value.problems[0]


def test_what_peers_call_a_field_is_a_field():
    for name in PEERS.values():
        field_hint(name)
    assert not {name.rpartition(".")[2] for name in field_names()} & set(PEERS)


def test_all_wrong_flags_are_told_at_once_with_values_out_of_range():
    flags = ["--optimizer.lr=1", "--train.steps=ten", "--train.log_every=0", "--model.norm_bias=perhaps", "--optimizer.beta2=2"]
    with pytest.raises(ConfigError) as raised:
        parse(f"--config={CONFIGS / 'quickstart.py'}", *flags)
    told = [problem.split("=")[0] for problem in raised.value.problems]
    assert told == ["--optimizer.lr", "--train.steps", "--model.norm_bias", "train.log_every", "optimizer.beta2"]


def test_a_verbs_own_flags_stand_beside_the_fields():
    arguments = ["--sweep", "mesh.tensor=1,2", f"--config={CONFIGS / '70b.py'}", "--hosts=1e1", "--json", "--verify", "0"]
    line = parse_line(USAGE, [*arguments, "--sweep=train.remat=dots,full", "--mesh.fsdp=4"])
    config = line.config
    assert line.given == ("mesh.fsdp",)
    assert line.own == PlanFlags(sweep=("mesh.tensor=1,2", "train.remat=dots,full"), hosts=10, json=True, verify=0)
    assert (config.name, config.mesh.fsdp) == ("70b", 4)


def test_a_number_that_is_none_is_left_to_the_rules():
    assert math.isnan(parse(f"--config={CONFIGS / 'quickstart.py'}", "--optimizer.peak_lr=nan").optimizer.peak_lr)


def printed(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_line(USAGE, arguments)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_flag_once_the_verbs_own_first(capsys):
    text = printed(capsys, "--help")
    words = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    own = [f"--{field.name}" for field in dataclasses.fields(PlanFlags)]
    assert words[: len(own)] == own
    assert sorted(words[len(own) :]) == sorted(f"--{name}" for name in field_names())
    absent = ["data.validation.0", "train.stages.0", "train.stages.0.rope_scaling"]
    assert text.count("None until one of its flags is given") == len([*OPTIONAL, *absent])
    assert all(line == line.rstrip() and len(line) <= 128 for line in text.splitlines())


def test_every_flag_has_a_text(capsys):
    """The string below its field."""
    text = " ".join(printed(capsys, "-h").split())
    for flag in re.findall(r"--[\w.]+", text):
        assert not re.search(rf"{re.escape(flag)} \S+ \(default", text), flag


def test_help_shows_what_the_file_says_beside_the_default(capsys):
    text = printed(capsys, f"--config={CONFIGS / '7b.py'}", "--help=model")
    assert "--model.embed_dim INT" in text
    assert "(default: 256; here 4096)" in " ".join(text.split())
    assert "--mesh.fsdp" not in text
    assert "--model.moe.num_experts" in text


def test_help_of_one_section(capsys):
    assert printed(capsys, "--help=optimizer").startswith("optimizer: ")
    assert "--data.sources.0.kind {" in printed(capsys, "--help=data.sources.0")
    with pytest.raises(UsageError, match="did you mean 'optimizer'"):
        parse_line(USAGE, ["--help=optimiser"])


@dataclasses.dataclass(frozen=True)
class CopyFlags:
    """Of a verb without a config."""

    source: str
    """From where."""
    targets: tuple[str, ...]
    """To where."""
    level: int
    """How."""
    env: tuple[str, ...] = ("A=1",)
    """Variables."""
    dry_run: bool = False
    """Only say so."""
    shares: tuple[float, ...] = ()
    """Numbers."""


COPY = Usage("copy", "Copy.", CopyFlags, words=("source", "targets"), config="none")


def test_words_and_flags_of_a_verb_without_a_config():
    line = parse_line(COPY, ["a", "b", "--dry-run", "c,d", "--env", "B=1,2", "C", "--level=1e1", "--env=D"])
    assert line.own == CopyFlags("a", ("b", "c,d"), 10, ("B=1,2", "C", "D"), True)
    assert parse_line(COPY, ["a", "b", "--level", "-2"]).own == CopyFlags("a", ("b",), -2)
    shares = parse_line(COPY, ["a", "b", "--level=1", "--shares=1,0.5", "--shares", "2", "1e3"]).own.shares
    assert shares == (1.0, 0.5, 2.0, 1000.0)
    with pytest.raises(ConfigError, match="--shares=x: give a number"):
        parse_line(COPY, ["a", "b", "--level=1", "--shares=x"])


def test_all_that_is_wrong_with_it_is_told_at_once():
    with pytest.raises(ConfigError, match="5 problems on the command line") as raised:
        parse_line(COPY, ["--levl=3", "--env", "--train.steps=3"])
    told = raised.value.problems
    assert told[0] == "--levl=3: no such flag; did you mean --level?"
    assert told[1] == "--train.steps=3: no such flag; --help lists all"
    assert [problem.split(" is")[0] for problem in told[2:]] == ["SOURCE", "TARGETS", "--level"]


@pytest.mark.parametrize("arguments", [[], ["--mesh.fsdp=2"], ["--config="], ["--config"]])
def test_a_missing_config_flag(arguments: list[str]):
    with pytest.raises(ConfigError, match=r"--config=configs/quickstart.py"):
        parse(*arguments)
