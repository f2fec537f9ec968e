"""The loop with fake steps: what is dispatched, waited for and told to whom, in which order."""

import pytest

from jaxtrain.train.loop import Hook, Hooks, Loop


class Recorder(Hook):
    """Writes every call into a shared list; wants the steps in `wanted`, and stops after `stop_after`."""

    def __init__(self, events, name="hook", wanted=(), stop_after=None):
        self.events, self.name, self.wanted, self.stop_after = events, name, wanted, stop_after
        self.begun = 0

    def before_step(self, step, state):
        self.begun = step
        self.events.append(f"{self.name} before {step}")

    def metrics_read(self, step, metrics):
        assert metrics == {"loss": 10.0 * step}
        self.events.append(f"{self.name} read {step}")

    def after_step(self, step, state):
        assert state == step
        self.events.append(f"{self.name} after {step}")

    def stop_reason(self):
        return f"{self.name} has had enough" if self.begun == self.stop_after else None


def make_loop(events, hooks, last_step, first_step=0):
    """State: the steps done. Batch: its number in the data, from 0, so batch n must meet state n."""
    batches = iter(range(first_step, 1000))

    def step_function(state, batch):
        assert batch == state
        events.append(f"dispatch {state + 1}")
        return state + 1, {"loss": 10.0 * (state + 1)}

    def wait(metrics):
        events.append(f"wait {metrics['loss'] / 10:.0f}")
        return metrics

    registered = Hooks()
    for hook in hooks:
        registered.add(hook, every=lambda step, hook=hook: step in hook.wanted)
    return Loop(step_function, lambda state, step: next(batches), wait, registered, first_step, first_step, last_step)


def only(events, *kinds):
    return [event for event in events if event.split()[0] in kinds]


def test_the_next_step_is_dispatched_before_the_last_one_is_waited_for():
    events = []
    loop = make_loop(events, [], last_step=4)
    assert loop.run() is None
    assert events == ["dispatch 1", "dispatch 2", "wait 1", "dispatch 3", "wait 2", "dispatch 4", "wait 3", "wait 4"]
    assert (loop.step, loop.state) == (4, 4)


def test_a_hook_that_wants_the_state_gets_it_after_its_own_metrics():
    events = []
    make_loop(events, [Recorder(events, wanted=(2,))], last_step=3).run()
    assert events == [
        "hook before 1", "dispatch 1",
        "hook before 2", "dispatch 2", "wait 1", "hook read 1", "wait 2", "hook read 2", "hook after 2",
        "hook before 3", "dispatch 3", "wait 3", "hook read 3",
    ]  # fmt: skip


def test_hooks_are_called_in_their_order():
    events = []
    make_loop(events, [Recorder(events, "first", wanted=(1,)), Recorder(events, "second", wanted=(1,))], last_step=1).run()
    assert [event for event in events if event.split()[0] in ("first", "second")] == [
        "first before 1", "second before 1", "first read 1", "second read 1", "first after 1", "second after 1",
    ]  # fmt: skip


def test_a_reason_ends_the_loop_with_every_metric_read():
    events = []
    loop = make_loop(events, [Recorder(events, stop_after=3)], last_step=100)
    assert loop.run() == "hook has had enough"
    assert loop.step == 3
    assert only(events, "dispatch") == ["dispatch 1", "dispatch 2", "dispatch 3"]
    assert only(events, "wait") == ["wait 1", "wait 2", "wait 3"]
    assert events[-1] == "hook read 3"


def test_the_first_reason_is_the_one_given():
    events = []
    hooks = [Recorder(events, "a"), Recorder(events, "b", stop_after=1), Recorder(events, "c", stop_after=1)]
    assert make_loop(events, hooks, last_step=5).run() == "b has had enough"


@pytest.mark.parametrize("first", [3, 7])
def test_a_resumed_loop_goes_on_from_its_step(first):
    events = []
    loop = make_loop(events, [Recorder(events)], last_step=7, first_step=first)
    assert loop.run() is None
    assert loop.step == 7
    assert only(events, "dispatch") == [f"dispatch {n}" for n in range(first + 1, 8)]
    assert only(events, "wait") == [f"wait {n}" for n in range(first + 1, 8)]


def test_how_often_a_hook_is_due():
    """By its own `every`, by that of `add`, and a function at every step; closed the last one first."""

    class Own(Hook):
        every = 3

    told, hooks, own, given, silent = [], Hooks(), Own(), Own(), Hook()
    for name, hook in (("own", own), ("given", given), ("silent", silent)):
        hook.close = lambda name=name: told.append(name)
    hooks.add(own)
    hooks.add(given, every=4)
    hooks.add(silent)
    hooks.add(lambda step, state: told.append(step), every=2)
    hooks.add(lambda step, state: None)
    assert [hook for hook in hooks.due(12)][:2] == [own, given]
    assert [len(hooks.due(step)) for step in (1, 2, 3, 4, 12)] == [1, 2, 2, 3, 4]
    assert silent not in hooks.due(12)
    hooks.due(2)[0].after_step(2, None)
    hooks.close()
    assert told == [2, "silent", "given", "own"]
