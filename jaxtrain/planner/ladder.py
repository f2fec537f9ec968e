"""Small runs that foretell a large one: which sizes and lengths they have, and what is known from their results.

N is the parameters that a token is multiplied by (`telemetry.flops.ParameterCount.matmul`): the layers' projections and the
output projection, without the embedding's lookup, norms, and the experts that a token does not use. So 6 N D FLOPs are a run's,
but for attention. D is the tokens that it trains on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtrain.config import Config, ModelConfig, to_plain
from jaxtrain.errors import UsageError, violated
from jaxtrain.files import user_path
from jaxtrain.planner.ladder_flags import LadderFlags
from jaxtrain.planner.scaling_law import BestRate, FittedLaw, Interval, best_rate, fit_law, predict_rate
from jaxtrain.telemetry.flops import model_flops_per_token, num_parameters

FILE = "ladder.json"
LEAST_STEPS = 20
ALONE: dict[str, Any] = {"stop_at_validation_loss": 0.0, "tasks": (), "sample_tokens": 0}
"""Fields of `train` of small runs, which are measured by their last validation alone."""
MOST_RATES = 9
"""Learning rates of a size, after which the best of them is taken whatever may lie beyond."""
NEAR = 1.2
"""A rate within this factor of the best one is as good: a parabola as steep as 0.2 nats a factor of e is 0.007 higher there."""


def parameters_of(model: ModelConfig) -> int:
    """Return N, the parameters that a token is multiplied by."""
    return num_parameters(model).matmul


def tokens_of(config: Config) -> int:
    """Return D, the tokens of the whole run."""
    return config.train.steps * tokens_per_step(config)


def tokens_per_step(config: Config) -> int:
    """Return the tokens of the global batch."""
    return config.train.global_batch_size * config.data.sequence_length


def flops_of(config: Config, tokens: float) -> float:
    """Return the model FLOPs of training on so many tokens, with the causal half of attention."""
    return tokens * model_flops_per_token(config.model, config.data.sequence_length, "causal")


# ---------------------------------------------------------------------------------------------------------------------
# The sizes


def smaller_model(model: ModelConfig, wanted: float) -> ModelConfig:
    """Return the model whose N is nearest to `wanted`, by fewer layers and heads at nearly the same ratio of depth to width.

    head_dim, the ratios of heads, key and value heads, widths and MLP, experts and the pattern of layers stay.

    Raises:
      UsageError: there is none within a factor of 1.5.
    """
    candidates = []
    for heads in range(model.num_heads // model.num_kv_heads, model.num_heads + 1, model.num_heads // model.num_kv_heads):
        if model.embed_dim * heads % model.num_heads == 0:
            narrow = narrower(model, heads)
            for layers in range(model.first_dense_layers + len(model.kinds), model.num_layers + 1, len(model.kinds)):
                small = replace(narrow, num_layers=layers)
                shape = math.log(layers * model.embed_dim / (model.num_layers * small.embed_dim))
                candidates.append((abs(math.log(parameters_of(small) / wanted)) + 0.2 * abs(shape), small))
    _, best = min(candidates, key=lambda candidate: candidate[0], default=(0, model))
    found = parameters_of(best)
    if not candidates or max(found / wanted, wanted / found) > 1.5:
        raise UsageError(
            f"no smaller model has about {wanted:,.0f} parameters: the nearest, of {best.num_layers} layers and "
            f"{best.num_heads} heads, has {found:,}; give fewer --sizes, a larger --largest, or a smaller model.head_dim"
        )
    return best


def narrower(model: ModelConfig, heads: int) -> ModelConfig:
    """Return the model with this many heads, and its widths in proportion; the MLP's are multiples of 8."""
    share, moe, latent = heads / model.num_heads, model.moe, model.latent_attention

    def width(whole: int) -> int:
        return max(8, round(whole * share / 8) * 8)

    if latent:
        ranks = {name: width(rank) if (rank := getattr(latent, name)) else 0 for name in ("query_rank", "kv_rank")}
        latent = replace(latent, **ranks)
    return replace(
        model,
        embed_dim=model.embed_dim * heads // model.num_heads,
        num_heads=heads,
        num_kv_heads=heads * model.num_kv_heads // model.num_heads,
        mlp_dim=width(model.mlp_dim),
        moe=moe and replace(moe, mlp_dim=width(moe.mlp_dim)),
        latent_attention=latent,
    )


def sizes_of(config: Config, flags: LadderFlags) -> list[Config]:
    """Return the config with each small model, smallest first.

    Raises:
      UsageError: two sizes would be the same model, or one cannot be made.
    """
    whole = parameters_of(config.model)
    shares = [flags.largest / flags.ratio**i for i in reversed(range(flags.sizes))]
    models = [smaller_model(config.model, share * whole) for share in shares]
    counts = [parameters_of(model) for model in models]
    if len(set(counts)) < len(counts):
        words = ", ".join(f"{count:,}" for count in counts)
        raise UsageError(f"--sizes={flags.sizes}: models of {words} parameters; give fewer, or a larger --ratio")
    return [replace(config, model=model) for model in models]


def small_run(size: Config, config: Config, tokens: float, rate: float) -> Config:
    """Return the config of a small run: the config's own schedule and batch, at another length and rate, validated at its end.

    It has `tokens` times the config's tokens per parameter; warm-up keeps its share of the steps.

    Raises:
      UsageError: it would have fewer than LEAST_STEPS steps.
    """
    per_parameter = tokens_of(config) / parameters_of(config.model)
    steps = round(tokens * per_parameter * parameters_of(size.model) / tokens_per_step(config))
    if steps < LEAST_STEPS:
        raise UsageError(
            f"a model of {parameters_of(size.model):,} parameters would train for {steps} steps; the least is {LEAST_STEPS}: "
            "give a smaller --train.global_batch_size, more --train.steps, or fewer --sizes"
        )
    train, optimizer = config.train, config.optimizer
    checkpoint = replace(
        config.checkpoint, keep=1, keep_every=0, keep_best=0, fast_every=0, mirror="", export_hf="", resume="auto"
    )
    return replace(
        size,
        optimizer=replace(optimizer, peak_lr=rate, warmup_steps=round(optimizer.warmup_steps * steps / train.steps)),
        train=replace(train, steps=steps, log_every=max(1, min(train.log_every, steps // 50)), validate_every=steps, **ALONE),
        checkpoint=checkpoint,
        telemetry=replace(config.telemetry, wandb_project="", prometheus="", profile=""),
    )


def check_config(config: Config) -> None:
    """Raise UsageError for a config whose loss is not one of text learnt from the start."""
    reasons = {
        f"objective.kind={config.objective.kind}: the law is one of pretraining": config.objective.kind != "pretrain",
        "init_from: small models begin with random weights": config.init_from,
        f"lora.rank={config.lora.rank}: small models train all weights": config.lora.rank,
        "train.stages: they begin at steps of the long run": config.train.stages,
        "data.validation_fraction=0: losses are those of held-out text": not config.data.validation_fraction
        and not getattr(config.data, "validation", ()),
    }
    if wrong := violated(reasons):
        raise UsageError(f"a ladder cannot be made of this config: {'; '.join(wrong)}")


# ---------------------------------------------------------------------------------------------------------------------
# The results


@dataclass(frozen=True)
class SmallRun:
    """A small run that is done."""

    folder: str
    """Below the ladder's folder."""
    size: int
    """Number of its size, from 0, the smallest."""
    multiple: float
    """Its tokens per parameter, over the config's."""
    parameters: int
    tokens: int
    rate: float
    loss: float
    """Final held-out loss, nats a token; infinite where the run diverged."""


@dataclass(frozen=True)
class Forecast:
    """The predicted loss of a run of some size and length, and the peak learning rate that it wants."""

    parameters: float
    tokens: float
    loss: Interval
    rate: Interval
    """At the tokens per parameter of the ladder's own config."""
    beyond: float
    """Parameters over those of the largest small run."""


@dataclass(frozen=True)
class Ladder:
    """The small runs of a config, and what was fitted to them."""

    config: dict[str, Any]
    """The large run's, as plain values."""
    runs: tuple[SmallRun, ...]

    @property
    def first(self) -> float:
        """The multiple at which rates are compared: that of the first run."""
        return self.runs[0].multiple

    def rates(self, size: int) -> dict[float, float]:
        """Return {learning rate: loss} of a size, at the length where rates are compared."""
        return {run.rate: run.loss for run in self.runs if run.size == size and run.multiple == self.first}

    def best_rates(self) -> dict[int, BestRate]:
        """Return the best learning rate of each size.

        Raises:
          ExplainedError: all of a size's runs diverged.
        """
        return {size: best_rate(self.rates(size)) for size in sorted({run.size for run in self.runs})}

    def points(self) -> list[tuple[int, int, float]]:
        """Return (N, D, loss) of each size and length: of the best run, or of that at its size's best learning rate."""
        best, found = self.best_rates(), {}
        for run in self.runs:
            loss = best[run.size].loss if run.multiple == self.first else run.loss
            if math.isfinite(loss):
                found[run.parameters, run.tokens] = loss
        return [(n, d, loss) for (n, d), loss in found.items()]

    @functools.cached_property
    def law(self) -> FittedLaw:
        """The law fitted to the points.

        Raises:
          ExplainedError: there are too few.
        """
        parameters, tokens, losses = zip(*self.points(), strict=True)
        return fit_law(parameters, tokens, losses)

    def forecast(self, parameters: float, tokens: float) -> Forecast:
        """Return the loss that a run of so many parameters and tokens reaches, and its learning rate."""
        sizes = {run.size: run.parameters for run in self.runs}
        best = self.best_rates()
        rate = predict_rate([sizes[size] for size in best], [found.rate for found in best.values()], parameters)
        loss = self.law.predict(parameters, tokens)
        return Forecast(parameters, tokens, loss, rate, parameters / max(sizes.values()))

    def to_json(self, forecast: Forecast | None = None) -> str:
        """Return the text of ladder.json: the runs, and once all are done what was fitted to them."""
        runs = [dataclasses.asdict(run) | {"loss": run.loss if math.isfinite(run.loss) else None} for run in self.runs]
        plain: dict[str, Any] = {"config": self.config, "runs": runs}
        if forecast:
            law = self.law
            plain |= {
                "law": dataclasses.asdict(law.law),
                "exponents": {name: dataclasses.asdict(v) for name, v in zip(("alpha", "beta"), law.exponents, strict=True)},
                "best_rates": [dataclasses.asdict(best) for best in self.best_rates().values()],
                "forecast": dataclasses.asdict(forecast),
            }
        return json.dumps(plain, indent=1) + "\n"


def read_ladder(text: str) -> Ladder:
    """Return the ladder of `to_json`'s text.

    Raises:
      ValueError: it is no such text.
    """
    try:
        plain = json.loads(text)
        runs = [SmallRun(**run | {"loss": math.inf if run["loss"] is None else run["loss"]}) for run in plain["runs"]]
        return Ladder(dict(plain["config"]), tuple(runs))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not the JSON of a ladder: {error}") from error


def open_ladder(path: str, config: Config) -> Ladder:
    """Return the ladder that --ladder names, for a config of the same tokens.

    Raises:
      UsageError: it cannot be read, has no runs, or its losses are of other tokens.
    """
    try:
        ladder = read_ladder(user_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"--ladder={path}: {why}; give a ladder.json of `jaxtrain ladder`") from error
    if not ladder.runs:
        raise UsageError(f"--ladder={path}: no small run is done; run `jaxtrain ladder` to its end")
    ours = json.loads(json.dumps(to_plain(config)))
    for section, name in (("data", "tokenizer"), ("model", "vocab_size")):
        theirs = ladder.config.get(section, {}).get(name)
        if theirs != ours[section][name]:
            raise UsageError(
                f"--ladder={path}: its losses are of tokens of {section}.{name}={theirs}, and this config has "
                f"{ours[section][name]}; make a ladder of this config"
            )
    return ladder


def forecast_words(forecast: Forecast) -> str:
    """Return a forecast in two sentences."""

    def between(interval: Interval, form: str) -> str:
        value = format(interval.value, form)
        if interval.low is None or interval.high is None:
            return value
        return f"{value} (90%: {interval.low:{form}} to {interval.high:{form}})"

    return (
        f"By its ladder, {forecast.parameters:,.0f} parameters on {forecast.tokens:,.0f} tokens reach a held-out loss of "
        f"{between(forecast.loss, '.4f')} nats a token, with a peak learning rate of {between(forecast.rate, '.3g')}. That is "
        f"{forecast.beyond:.3g} times the parameters of its largest run."
    )


def describe_sizes(configs: Sequence[Config]) -> list[tuple[str, ...]]:
    """Return a row of words for each config: layers, width, heads, N, D, steps, FLOPs."""
    rows = []
    for config in configs:
        model = config.model
        numbers = (parameters_of(model), tokens_of(config), config.train.steps)
        shape = (str(model.num_layers), str(model.embed_dim), str(model.num_heads))
        rows.append((*shape, *(f"{number:,}" for number in numbers), f"{flops_of(config, tokens_of(config)):.2e}"))
    return rows
