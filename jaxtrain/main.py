"""`python -m jaxtrain.main --config=configs/quickstart.py`: one training run, from the command line to the last checkpoint.

Exit codes: 0 done, 1 an error explained in one message, 2 wrong usage, 76 stopped by a signal after saving.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from jaxtrain.config import parse_command_line, validate
from jaxtrain.errors import EXIT_ERROR, ExplainedError

DESCRIPTION = "Train a transformer. Every field of the config is a flag; the file named by --config sets their defaults."


def explained(work: Callable[[], int]) -> int:
    """Calls `work` for an exit code; an ExplainedError, an interrupt or a lack of device memory becomes one message."""
    try:
        return work()
    except ExplainedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted outside the training loop; nothing that was saved is lost", file=sys.stderr)
        return EXIT_ERROR
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"error: out of device memory: {str(error).splitlines()[0]}\nWhat helps: more mesh.fsdp or mesh.tensor, more "
            "train.microbatches, --train.remat=full, a smaller train.global_batch_size or data.sequence_length.",
            file=sys.stderr,
        )
        return EXIT_ERROR


def train(arguments: Sequence[str]) -> int:
    """Parses, validates, trains; returns the exit code."""
    config = parse_command_line(arguments, DESCRIPTION, "python -m jaxtrain.main")

    import jax  # after parsing, so that a typo is answered at once

    from jaxtrain.telemetry.progress import open_progress
    from jaxtrain.train.run import Run

    config = validate(config, jax.device_count())
    with open_progress(config.train.steps, process_index=jax.process_index()) as progress:
        return Run(config, progress).train()


if __name__ == "__main__":
    sys.exit(explained(lambda: train(sys.argv[1:])))
