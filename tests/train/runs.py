"""What the tests of whole runs in this process give a run: something that keeps its words, something that stops it."""

import signal

from jaxtrain.config import Recipe
from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.stop import StopOnSignal


def prepared_of(config, mesh, optimizer=None):
    """A config made ready with a mesh and an optimizer of the test's own, and the plain attention."""
    prepared = Prepared.__new__(Prepared)
    prepared.config, prepared.mesh, prepared.optimizer, prepared.backend = config, mesh, optimizer, "reference"
    prepared.recipe = Recipe(config)
    return prepared


class Said(Progress):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


class StopAt(StopOnSignal):
    """As if SIGTERM had come during a step."""

    def __init__(self, step):
        super().__init__(Progress())
        self.step = step

    def before_step(self, step, state):
        if step == self.step:
            self.received = signal.SIGTERM
