"""Going back to a step: what came after it is a branch, whole or not there, whatever moment a process dies in."""

import os

import pytest

from jaxtrain.checkpoint import COMMIT_MARK, METADATA_FILE, branches, committed_steps
from jaxtrain.checkpoint.branches import finish, leave, newest_return
from jaxtrain.checkpoint.fast import TOKEN_FILE

STEPS = [2, 4, 6, 8]


class Killed(BaseException):
    """As if the process had ended here."""


def run_at(folder):
    """A run's folder of four steps, with metrics and a token of the fast tier."""
    for step in STEPS:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        for name in (COMMIT_MARK, METADATA_FILE):
            (folder / "checkpoints" / str(step) / name).write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 9)))
    (folder / TOKEN_FILE).write_text("before")
    return folder


def killing(patch, moment):
    """Kill the process at its `moment`-th change of a file or folder, before it."""
    left = [moment]

    def before(change):
        def changed(*arguments, **more):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return change(*arguments, **more)

        return changed

    patch.setattr(branches.os, "rename", before(os.rename))
    patch.setattr(branches, "replace_file", before(branches.replace_file))


def test_later_steps_move_and_rows_are_copied(tmp_path):
    run = run_at(tmp_path)
    assert newest_return(run) is None
    branch = leave(run, 4, {"rollbacks.json": "[]\n"})
    assert committed_steps(run / "checkpoints") == [2, 4]
    assert committed_steps(branch / "checkpoints") == [6, 8]
    assert (branch / "metrics.jsonl").read_text().count("\n") == 8
    assert (run / "rollbacks.json").read_text() == "[]\n"
    assert (run / TOKEN_FILE).read_text() != "before"  # no snapshot brings later steps back
    assert newest_return(run) == 4
    leave(run, 2, {})
    assert newest_return(run) == 2
    assert [path.name for path in branches.branches(run)] == ["after-4-1", "after-2-2"]


@pytest.mark.parametrize("moment", range(7))
def test_a_kill_at_any_moment_loses_nothing(tmp_path, monkeypatch, moment):
    """Renames and replacements: the note, the branch's name, the token, a file, two steps, the note again."""
    run = run_at(tmp_path)
    with monkeypatch.context() as patch:
        killing(patch, moment)
        with pytest.raises(Killed):
            leave(run, 4, {"rollbacks.json": "[]\n"})
    finish(run)
    is_back = committed_steps(run / "checkpoints") == [2, 4]
    assert is_back == (moment > 1)
    assert is_back or committed_steps(run / "checkpoints") == STEPS
    assert newest_return(run) == (4 if is_back else None)
    assert (run / TOKEN_FILE).read_text() == "before" if not is_back else (run / "rollbacks.json").exists()
    branch = leave(run, 4, {}) if not is_back else branches.branches(run)[0]
    assert committed_steps(branch / "checkpoints") == [6, 8]
    (run / "checkpoints" / "6").mkdir()  # of the run that goes on
    finish(run)
    assert (run / "checkpoints" / "6").exists()
