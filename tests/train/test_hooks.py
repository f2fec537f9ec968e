"""The hooks by themselves: signals that are heard at any moment, validation that stops, saves that fail."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxtrain.errors import CheckpointError, Stopped
from jaxtrain.telemetry.energy import EnergyLog
from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.hooks import Logging, Saving, Telemetry, Validation, multiples
from jaxtrain.train.stop import StopOnSignal, describe_lost


class Said(Progress):
    """Keeps what is said and logged."""

    def __init__(self):
        self.lines, self.rows, self.statuses = [], [], []

    def say(self, text):
        self.lines.append(text)

    def update(self, row):
        self.rows.append(row)


class Log:
    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(row)


class Clock:
    """Stands still."""

    def __init__(self):
        self.pauses = 0

    def step_done(self, step, share):
        pass

    def window(self):
        return {"step_seconds": 1.0}

    @contextlib.contextmanager
    def paused(self):
        self.pauses += 1
        yield


def send(number, stop):
    """Sends this process a signal, and waits until the watching thread has it."""
    os.kill(os.getpid(), number)
    wait_until(lambda: stop.received is not None)


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# --- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_a_reason_to_stop(number):
    said, before = Said(), signal.getsignal(number)
    with StopOnSignal(said) as stop:
        assert stop.stop_reason() is None
        stop.check()
        send(number, stop)
        assert stop.stop_reason() == f"{number.name} received"
        with pytest.raises(Stopped, match=number.name):
            stop.check()
        with pytest.raises(Stopped), stop.breakable():
            pytest.fail("began work that should not begin any more")
        wait_until(lambda: said.lines)
    assert signal.getsignal(number) is before
    assert len(said.lines) == 1
    assert number.name in said.lines[0]


def signal_and_wait(number):
    os.kill(os.getpid(), number)
    time.sleep(60)
    pytest.fail("the signal did not break this off")


def test_a_signal_breaks_off_what_is_breakable():
    with StopOnSignal(Said()) as stop, pytest.raises(Stopped, match="SIGTERM"), stop.breakable():
        signal_and_wait(signal.SIGTERM)


def test_without_being_entered_it_leaves_signals_alone():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    stop = StopOnSignal(Said())
    try:
        with pytest.raises(KeyboardInterrupt):
            signal_and_wait(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.received is None


HANGING = """
import ctypes, signal, sys
from jaxtrain.telemetry.progress import PlainProgress
from jaxtrain.train.stop import StopOnSignal
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with StopOnSignal(PlainProgress(200)) as stop:
    stop.newest_saved = lambda: 100
    stop.before_step(137, None)
    library.pthread_mutex_lock(mutex)
    print("hanging", flush=True)
    library.pthread_mutex_lock(mutex)  # like a step that waits for a dead host: no Python runs in this thread again
"""


def insist(child, number):
    """The exit code after this signal; it is sent again where a busy machine has heard the first one late."""
    for _ in range(40):
        child.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(1.3)
    return None


@pytest.mark.parametrize(
    ("signals", "exit_code"),
    [(["INT", "INT"], 130), (["INT", "HUP", "TERM"], 143), (["nohup", "HUP", "TERM", "INT"], 130)],
    ids=["INT-INT", "INT-HUP-TERM", "nohup-HUP-TERM-INT"],
)
def test_a_second_request_ends_a_hanging_process_at_once(signals, exit_code):
    """And says what is lost. Signals that do not end it are an echo of the first, a SIGHUP, or ignored."""
    mode = "nohup" if signals[0] == "nohup" else "terminal"
    child = subprocess.Popen([sys.executable, "-c", HANGING, mode], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "hanging\n"
        *firsts, last = [name for name in signals if name != "nohup"]
        for name in firsts:
            child.send_signal(getattr(signal, "SIG" + name))
            child.send_signal(getattr(signal, "SIG" + name))
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(1.3)
        assert insist(child, getattr(signal, "SIG" + last)) == exit_code
        assert "ended      at once: steps 101 to 137 are not saved\n" in child.stdout.read()
    finally:
        child.kill()


@pytest.mark.parametrize(
    ("saved", "step", "words"),
    [
        (100, 137, "steps 101 to 137 are not saved"),
        (0, 1, "step 1 is not saved"),
        (136, 137, "step 137 is not saved"),
        (137, 137, "step 137 is saved, and nothing is lost"),
        (100, 0, "step 100 is saved, and nothing is lost"),
        (0, 0, "no step was taken"),
    ],
)
def test_what_is_lost_is_said_in_numbers(saved, step, words):
    assert describe_lost(saved, step) == words


# --- logging


def test_rows_are_a_function_of_the_step_alone():
    """Whether a process begins at 0 or in between: the first step, every multiple, and the last."""
    log, said = Log(), Said()
    logging = Logging(Telemetry(log, said, Clock()), multiples(10, 1, 25), lambda step, updates: updates / 100)
    for step in range(1, 26):
        logging.metrics_read(step, {"loss": float(step), "grad_norm": 1.0, "targets": 3.0 if step != 2 else 6.0})
    assert [row["step"] for row in log.rows] == [1, 10, 20, 25]
    assert said.rows == log.rows
    row = log.rows[1]
    assert list(row)[:5] == ["step", "loss", "loss_mean", "grad_norm", "learning_rate"]
    assert row["loss"] == 10.0
    assert row["loss_mean"] == pytest.approx((sum(range(2, 11)) + 2) / 10)  # of steps 2 to 10, the second with twice the tokens
    assert (log.rows[0]["loss_mean"], log.rows[-1]["loss_mean"]) == (1.0, 23.0)
    assert row["learning_rate"] == 0.09  # of the step that was taken: the tenth is number 9
    assert (row["targets"], row["step_seconds"]) == (3.0, 1.0)


def test_a_step_that_is_not_finite_does_not_spoil_the_mean():
    log = Log()
    logging = Logging(Telemetry(log, Said(), Clock()), multiples(5, 1, 10))
    for step in range(1, 11):
        logging.metrics_read(step, {"loss": float("nan") if step in (4, 6, 7, 8, 9, 10) else step, "grad_norm": 1.0})
    assert [row["loss_mean"] for row in log.rows] == [1.0, (2 + 3 + 5) / 3, None]


def test_rows_hold_the_energy_where_it_is_measured():
    class Meter:
        devices, description = 1, ""
        read = 0.0

        def joules(self) -> float:
            Meter.read += 100.0
            return Meter.read

    log = Log()
    logging = Logging(
        Telemetry(log, Said(), Clock()),
        multiples(5, 1, 10),
        energy=EnergyLog(Meter(), tokens=lambda steps: 10 * steps, last_step=10),
    )
    for step in range(1, 11):
        logging.metrics_read(step, {"loss": 2.0, "grad_norm": 1.0})
    assert [row["joules_per_token"] for row in log.rows] == [100 / 10, 100 / 40, 100 / 50]
    assert log.rows[-1]["energy_kwh"] == log.rows[-1]["energy_kwh_at_end"] == 300 / 3.6e6


# --- validation


def validation(losses, stop_at=0.0):
    losses = iter(losses)
    telemetry = Telemetry(Log(), Said(), Clock())
    rows = (None if loss is None else {"validation_loss": loss, "validation_bits_per_byte": loss / 2} for loss in losses)
    return Validation(telemetry, lambda state, ends: next(rows), lambda what, part: False, stop_at)


def test_multiples_and_other_steps_are_due():
    assert [step for step in range(1, 26) if multiples(10, 25)(step)] == [10, 20, 25]
    assert [step for step in range(1, 26) if multiples(0, 1)(step)] == [1]


def test_validation_writes_its_row():
    hook = validation([3.0])
    hook.after_step(10, {"params": None})
    telemetry = hook._telemetry
    row = {"step": 10, "validation_loss": 3.0, "validation_bits_per_byte": 1.5}
    assert telemetry.log.rows == telemetry.progress.rows == [row]
    assert telemetry.clock.pauses == 1


def test_a_validation_that_a_signal_leaves_writes_no_row():
    hook = validation([None])
    hook.after_step(10, {"params": None})
    assert hook._telemetry.log.rows == []
    assert hook._telemetry.progress.lines == ["validation that of step 10 is left unfinished"]
    assert hook.newest == {}


@pytest.mark.parametrize("seed", range(20))
def test_processes_leave_a_validation_before_the_same_part(seed, monkeypatch):
    """Four processes in a random order, of which two hear of a signal at random moments; none finishes a part alone."""
    draw, keys, parts, count = random.Random(seed), {}, 30, 4
    monkeypatch.setattr("jaxtrain.train.stop.are_several", lambda: True)
    monkeypatch.setattr("jaxtrain.train.stop.look", keys.get)
    monkeypatch.setattr("jaxtrain.train.stop.post", keys.setdefault)
    stops = [StopOnSignal(Said()) for _ in range(count)]
    begun, ended = [0] * count, [None] * count
    heard = {draw.randrange(count): draw.randrange(60) for _ in range(2)}
    for moment in range(10_000):
        for process in (process for process, when in heard.items() if moment >= when):
            stops[process].received = signal.SIGTERM
        ready = [i for i in range(count) if ended[i] is None and begun[i] < parts and begun[i] <= min(begun)]
        if not ready:
            break
        process = draw.choice(ready)
        if stops[process].ends_before("validating 8", begun[process]):
            ended[process] = begun[process]
            begun[process] = parts  # waits for no other
        else:
            begun[process] += 1
    assert len(set(ended)) == 1
    assert ended[0] is None or ended[0] < parts


@pytest.mark.parametrize(
    ("loss", "stop_at", "stops"),
    [(2.0, 2.0, True), (1.9, 2.0, True), (2.1, 2.0, False), (0.0, 0.0, False), (float("nan"), 2.0, False), (1.0, 0.0, False)],
)
def test_validation_stops_at_the_threshold(loss, stop_at, stops):
    hook = validation([loss], stop_at)
    assert hook.stop_reason() is None
    hook.after_step(10, {"params": None})
    reason = hook.stop_reason()
    assert (reason is not None) is stops
    assert not stops or f"{loss:.4f}" in reason
    assert not stops or f"train.stop_at_validation_loss={stop_at}" in reason


# --- saving


class FailingCheckpoints:
    """The save that was made before the next `wait` has failed."""

    def __init__(self, always=False):
        self.failure, self.always, self.saved = None, always, []

    def wait(self):
        failure, self.failure = self.failure, None
        if failure:
            raise failure

    def save(self, step, state, metadata, wait=False):
        if self.always:
            raise CheckpointError(f"step {step}: disk full")
        self.saved.append((step, state, wait))


def saving(checkpoints, said, stop_on_failure=False):
    def save(step, state, wait):
        checkpoints.save(step, f"canonical {state}", {}, wait)

    return Saving(Telemetry(Log(), said, Clock()), checkpoints, save, stop_on_failure)


def test_a_save_that_failed_is_told_and_the_next_one_is_made():
    checkpoints, said = FailingCheckpoints(), Said()
    hook = saving(checkpoints, said)
    hook.after_step(10, "a")
    checkpoints.failure = CheckpointError("step 10: disk full")
    hook.after_step(20, "b")
    hook.after_step(23, "c", wait=True)
    assert checkpoints.saved == [(10, "canonical a", False), (20, "canonical b", False), (23, "canonical c", True)]
    assert said.lines == ["warning    step 10: disk full"]


def test_a_save_that_failed_ends_the_run_where_the_config_says_so():
    checkpoints = FailingCheckpoints()
    hook = saving(checkpoints, Said(), stop_on_failure=True)
    hook.after_step(10, "a")
    checkpoints.failure = CheckpointError("step 10: disk full")
    with pytest.raises(CheckpointError, match="step 10"):
        hook.after_step(20, "b")
    assert [step for step, _, _ in checkpoints.saved] == [10]


def test_a_save_that_cannot_be_made_ends_the_run():
    hook = saving(FailingCheckpoints(always=True), Said())
    with pytest.raises(CheckpointError, match="step 10"):
        hook.after_step(10, "a")
