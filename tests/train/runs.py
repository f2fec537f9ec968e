"""What the tests of whole runs in this process give a run: something that keeps its words, something that stops it."""

import signal

from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.stop import StopOnSignal


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
