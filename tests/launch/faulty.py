"""`python -m tests.launch.faulty ...` is `jaxtrain train ...`, but something is wrong in one process.

FAULTY_HOW says what, and FAULTY_PROCESS in which process. Every process finds its data in a folder of its own,
FAULTY_HOSTS/I, as on hosts that share none.
"""

import os
import signal
import sys
import time

from jaxtrain.cli import explained
from jaxtrain.errors import ExplainedError
from jaxtrain.launch import distributed
from jaxtrain.verbs import train


def refuse(*_, **__):
    raise ExplainedError("this host has no such thing")


def nothing():
    pass


def at_command_line():
    sys.argv.append("--no.such.flag=1")


def at_validate():
    train.validate = refuse


def at_data():
    from jaxtrain.train import trainer

    trainer.open_data = refuse


def at_restore():
    from jaxtrain.checkpoint import Checkpoints

    Checkpoints.restore_newest = refuse


def at_compile():
    from jaxtrain.train import step

    step.compile_with_options = refuse


def at_first_step():
    from jaxtrain.train.hooks import HeartbeatHook

    HeartbeatHook.before_step = refuse


def unforeseen():
    from jaxtrain.train import trainer

    trainer.open_data = lambda config: 1 / 0


def tokenizer():
    from jaxtrain.data.tokenizers import ByteTokenizer

    ByteTokenizer.fingerprint = "another"


def program():
    """Computes something that has this process's number in it."""
    from jaxtrain.train import step

    real = step.make_loss_and_gradients

    def with_own_number(*arguments):
        mapped = real(*arguments)

        def region(params, batch):
            metrics, reports, gradients = mapped(params, batch)
            return metrics | {"loss": metrics["loss"] + 1.5}, reports, gradients

        return region

    step.make_loss_and_gradients = with_own_number


def hang_in_step():
    from jaxtrain.train.hooks import HeartbeatHook

    real = HeartbeatHook.before_step

    def before_step(hook, step, state):
        real(hook, step, state)
        if step == 4:
            time.sleep(1000)

    HeartbeatHook.before_step = before_step


def hang_in_restore():
    from jaxtrain.checkpoint import Checkpoints

    Checkpoints.restore_newest = lambda *_: time.sleep(1000)


def hang_in_save():
    from jaxtrain.train.hooks import Saving

    real = Saving.__init__

    def init(hook, *arguments, **named):
        real(hook, *arguments, **named)
        hook._save = lambda *_: time.sleep(1000)

    Saving.__init__ = init


def killed():
    from jaxtrain.train import trainer

    trainer.open_data = lambda config: os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    own = os.environ.get("JAXTRAIN_PROCESS_ID", "0")
    if hosts := os.environ.get("FAULTY_HOSTS"):
        os.chdir(f"{hosts}/{own}")
    if own == os.environ["FAULTY_PROCESS"]:
        globals()[os.environ["FAULTY_HOW"]]()
    distributed.run_and_exit(lambda: explained(lambda: train.main(sys.argv[1:])))
