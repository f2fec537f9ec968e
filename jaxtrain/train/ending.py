"""The end of a run: why it ended, its picture, and a sample of what the model writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.config import Config
from jaxtrain.data.pipeline import Data
from jaxtrain.errors import EXIT_DONE, EXIT_STOPPED
from jaxtrain.inference.model import Model
from jaxtrain.telemetry.flops import num_parameters
from jaxtrain.telemetry.plots import plot_losses
from jaxtrain.train.evaluation import continue_text


@dataclass(frozen=True)
class Ended:
    """The end of a run."""

    step: int
    """Steps done in all."""
    reason: str
    """Why there are no more, in words."""
    signal: int | None = None
    """The signal that stopped it."""
    saved: bool = True
    """Whether the same command goes on from `step`."""

    @property
    def exit_code(self) -> int:
        """0 done; 76 stopped by a signal after saving; 128 + the signal where nothing is saved."""
        return EXIT_DONE if self.signal is None else EXIT_STOPPED if self.saved else 128 + self.signal


def draw(config: Config, data: Data, picture: Path, say: Callable[[str], None]) -> None:
    """Draw the losses in metrics.jsonl beside the picture; say where it is, or why it was not drawn."""
    baseline = data.gzip_bits_per_byte
    title = f"{config.name}: {num_parameters(config.model).total:,} parameters"
    try:
        if plot_losses(picture.with_name("metrics.jsonl"), picture, title, {"gzip -9": baseline} if baseline else None):
            say(f"picture    {picture}")
    except Exception as error:  # of the disk, or of matplotlib, which may be broken: a picture is no reason to fail
        say(f"warning    {picture} was not drawn: {type(error).__name__}: {error}")


def sample_words(model: Model, data: Data, before_each: Callable[[], None]) -> str:
    """Return held-out text and its continuation by the model, in words; `before_each` is that of `continue_text`."""
    prompt = data.sample_prompt(min(64, model.config.data.sequence_length // 2))
    made = continue_text(model, prompt, model.config.train.sample_tokens, before_each)
    decode = data.tokenizer.decode
    return f"--- held-out text:\n{decode(prompt.tolist())}\n--- the model goes on:\n{decode(made)}\n---"
