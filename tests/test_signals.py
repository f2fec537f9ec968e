"""Which signals are one request, and that they are heard in order whatever the main thread does."""

import os
import signal
import threading
from signal import SIGHUP, SIGINT, SIGTERM

import pytest

from jaxtrain.signals import Requests, Watch

# (seconds, signal) of each; what each of them means.
HEARD = {
    "a terminal that closes": ([(0, SIGHUP), (0, SIGHUP)], ["stop", "same"]),
    "a terminal that closes slowly": ([(0, SIGHUP), (30, SIGHUP), (60, SIGHUP)], ["stop", "same", "same"]),
    "Ctrl-C, passed on": ([(0, SIGINT), (0.01, SIGTERM)], ["stop", "same"]),
    "Ctrl-C, and the terminal closed": ([(0, SIGINT), (5, SIGHUP)], ["stop", "same"]),
    "closed, and the session's processes ended": ([(0, SIGHUP), (0.9, SIGTERM), (1.8, SIGTERM)], ["stop", "same", "same"]),
    "asked twice": ([(0, SIGINT), (1.1, SIGINT)], ["stop", "at once"]),
    "asked in haste, then again": ([(0, SIGINT), (1, SIGINT), (2.5, SIGINT)], ["stop", "same", "at once"]),
    "closed, then told to end": ([(0, SIGHUP), (5, SIGTERM)], ["stop", "at once"]),
}


@pytest.mark.parametrize("case", HEARD)
def test_what_signals_mean(case):
    signals, means = HEARD[case]
    requests = Requests()
    assert [requests.hear(number, at, at) for at, number in signals] == means


def test_a_signal_that_may_have_come_with_the_first_does_not_insist():
    """The listening thread may be kept from running for seconds: then it knows only after which time a signal came."""
    requests = Requests()
    assert requests.hear(SIGINT, 0, 0.1) == "stop"
    assert requests.hear(SIGINT, 0.2, 7.0) == "same"
    assert requests.hear(SIGINT, 9.0, 9.1) == "at once"


def test_a_watch_hears_all_and_leaves_everything_as_it_was():
    heard, enough = [], threading.Event()

    def hear(number, request):
        heard.append((number, request))
        if len(heard) == 2:
            enough.set()

    before = [signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGHUP)]
    with Watch(hear):
        for number in (SIGHUP, SIGTERM):
            os.kill(os.getpid(), number)
        assert enough.wait(30)
    assert {number for number, _ in heard} == {SIGHUP, SIGTERM}
    assert [request for _, request in heard] == ["stop", "same"]
    assert [signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGHUP)] == before


def test_an_echo_that_comes_after_the_watch_is_an_echo():
    """Data is broken off within a millisecond; what Ctrl-C's receiver passes on then finds the watch outside."""
    heard, enough = [], threading.Event()

    def outside(number, request):
        heard.append(request)
        enough.set()

    inner = threading.Event()
    with Watch(outside):
        with Watch(lambda number, request: inner.set()):
            os.kill(os.getpid(), SIGINT)
            assert inner.wait(30)
        os.kill(os.getpid(), SIGTERM)
        assert enough.wait(30)
    assert heard == ["same"]
