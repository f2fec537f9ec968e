"""run_dir/log.txt, and what a start of the program is called."""

import logging
import subprocess

import pytest

from jaxtrain.telemetry.run_log import RunLog, about_program, git_commit, without_passwords
from tests.lines import STAMP, unstamped


def test_lines_wait_for_the_folder_to_be_ours_and_restarts_append(tmp_path):
    for number in (1, 2):
        log = RunLog(tmp_path, [].append)
        log.write(f"start {number}")
        assert (tmp_path / "log.txt").exists() == (number == 2)
        with log:
            logging.getLogger("jaxtrain.checkpoint").warning("step %d is damaged", number)
            log.write("\ud800 is no UTF-8")
    text = (tmp_path / "log.txt").read_text()
    assert all(STAMP.match(line) for line in text.splitlines())
    assert unstamped(text).splitlines() == [
        line for n in (1, 2) for line in (f"start {n}", f"warning    step {n} is damaged", "\\ud800 is no UTF-8")
    ]


def test_what_ended_the_run_is_the_last_line(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, [].append) as log:
        log.write(f"{1 / 0}")
    assert unstamped((tmp_path / "log.txt").read_text()) == "error      ZeroDivisionError: division by zero\n"


def test_a_full_disk_does_not_stop_what_is_said(tmp_path, disk):
    said, disk.room = [], 0
    with RunLog(tmp_path, said.append) as log:
        log.write("one")
        log.write("two")
        assert len(said) == 1
        disk.room = 1 << 30
        log.write("three")
    assert unstamped((tmp_path / "log.txt").read_text()).splitlines() == ["one", "two", "three"]


def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        done = subprocess.run(["git", "-C", tmp_path, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert git_commit(tmp_path) == ""
    git("init", "-q")
    assert git_commit(tmp_path) == "", "a checkout without a commit"
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first")
    assert git("rev-parse", "HEAD").startswith(git_commit(tmp_path))
    (tmp_path / "other").write_text("not tracked")
    assert not git_commit(tmp_path).endswith("-dirty")
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path).endswith("-dirty")
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_commit(tmp_path) == ""


def test_no_process_is_started_where_there_is_no_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started a process"))
    assert git_commit(tmp_path) == ""


def test_urls_keep_their_passwords_to_themselves():
    assert without_passwords("x --checkpoint.mirror=ftp://me:secret@host/run") == "x --checkpoint.mirror=ftp://***@host/run"
    assert set(about_program()) == {"time", "jaxtrain", "git", "python", "host", "command"}
