import jax
import jax.numpy as jnp
import pytest

from jaxtrain.config import Config, TelemetryConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.telemetry.profile import ProfileWindow


@pytest.fixture
def traces(monkeypatch):
    """What was asked of the profiler, in order."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory, **options: calls.append(("start", directory, options)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    return calls


def run(window, steps):
    for step in steps:
        window.on_step(step)


def test_the_window_holds_first_to_last(traces, tmp_path):
    window = ProfileWindow("10:12", tmp_path)
    run(window, range(1, 10))
    assert traces == []
    run(window, [10, 11, 12])
    assert window.tracing
    assert [call[0] for call in traces] == ["start"]
    assert window.on_step(13)
    assert [call[0] for call in traces] == ["start", "stop"]
    run(window, [11, 12, 13])
    assert len(traces) == 2
    _, directory, options = traces[0]
    assert directory == str(tmp_path / "profile")
    assert options["create_perfetto_trace"]
    assert not options.get("create_perfetto_link")


def test_a_run_that_ends_inside_closes_the_trace(traces, tmp_path):
    window = ProfileWindow("3:100", tmp_path)
    run(window, [1, 2, 3, 4])
    assert window.close(in_flight=jnp.ones(3))
    assert not window.close()
    assert [call[0] for call in traces] == ["start", "stop"]


def test_a_run_resumed_inside_traces_the_rest(traces, tmp_path):
    run(ProfileWindow("3:5", tmp_path), [5, 6])
    assert [call[0] for call in traces] == ["start", "stop"]


@pytest.mark.parametrize(("profile", "process_index"), [("", 0), ("1:3", 1)])
def test_nothing_without_a_window_or_on_other_processes(traces, tmp_path, profile, process_index):
    window = ProfileWindow(profile, tmp_path, process_index)
    run(window, range(5))
    assert not window.close()
    assert traces == []


@pytest.mark.parametrize("profile", ["10-13", "13:10", "0:3", "1:1000000"])
def test_a_window_outside_the_run_is_refused(profile):
    config = Config(telemetry=TelemetryConfig(profile=profile))
    assert [problem for problem in find_problems(config, 1)[1] if problem.startswith(f"telemetry.profile={profile!r}")]


def test_a_real_trace_lands_in_the_run_directory(tmp_path):
    window = ProfileWindow("1:2", tmp_path)
    step = jax.jit(lambda x: x @ x)
    x = jnp.ones((8, 8))
    for number in (1, 2, 3):
        window.on_step(number, in_flight=x)
        x = step(x)
    names = [file.name for file in (tmp_path / "profile").rglob("*") if file.is_file()]
    assert any(name.endswith(".xplane.pb") for name in names)
    assert "perfetto_trace.json.gz" in names


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("INTERNAL: xplane.pb\nat line 7")])
@pytest.mark.parametrize("call", ["start_trace", "stop_trace"])
def test_a_trace_that_cannot_be_written_costs_one_line(traces, tmp_path, monkeypatch, call, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(jax.profiler, call, fail)
    said = []
    window = ProfileWindow("2:3", tmp_path, say=said.append)
    run(window, range(1, 6))
    assert not window.close()
    (line,) = said
    assert line.startswith(f"warning    no profile in {tmp_path / 'profile'}: ")
    assert "\n" not in line
