"""Files beside checkpoints: replaced in one move, and gone on without where the disk does not take them."""

import os

import pytest

from jaxtrain import files
from jaxtrain.files import AppendedFile, ReplacedFiles, replace_file, replacing


def test_records_wait_in_memory_until_there_is_space(tmp_path, disk):
    said = []
    file = AppendedFile(tmp_path / "run" / "rows", said.append)
    file.append(b"one\n")
    disk.room = 2
    for record in (b"two\n", b"three\n"):
        file.append(record)
        assert file.path.read_bytes() == b"one\n", "half a record is never seen"
    disk.room = 1 << 30
    file.append(b"four\n")
    assert file.path.read_bytes() == b"one\ntwo\nthree\nfour\n"
    assert [line.partition(":")[0] for line in said] == [
        f"warning    {file.path} cannot be written",
        f"written    {file.path} again",
    ]


def test_what_never_finds_space_is_counted_at_the_end(tmp_path, disk):
    said = []
    file = AppendedFile(tmp_path / "rows", said.append)
    disk.room = 0
    file.append(b"one\n")
    file.append(b"two\n")
    file.close()
    file.close()
    assert len(said) == 2
    assert said[-1] == f"warning    {file.path} lacks 2 records that could not be written"


def test_memory_is_bounded(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(files, "MOST_RECORDS", 3)
    said = []
    file = AppendedFile(tmp_path / "rows", said.append)
    disk.room = 0
    for number in range(5):
        file.append(f"{number}\n".encode())
    disk.room = 1 << 30
    file.close()
    assert file.path.read_text() == "2\n3\n4\n"
    assert said[-1] == f"warning    {file.path} lacks 2 records that could not be written"


def test_the_newest_content_waits_and_the_old_file_stays(tmp_path, disk):
    said = []
    whole, path = ReplacedFiles(said.append), tmp_path / "config.json"
    assert whole.write(path, "old")
    disk.room = 1
    assert not whole.write(path, "newer")
    assert not whole.write(path, "newest", durable=True)
    whole.retry()
    assert path.read_text() == "old"
    disk.room = 1 << 30
    whole.retry()
    assert path.read_text() == "newest"
    assert os.listdir(tmp_path) == ["config.json"], "nothing is left beside it"
    assert len(said) == 2


def test_a_file_that_went_with_its_folder_is_begun_again(tmp_path):
    """The open file fails (ESTALE after a remount): the next record opens what stands there then."""
    file = AppendedFile(tmp_path / "run" / "rows", [].append)
    file.append(b"one\n")
    os.close(file._descriptor)
    file.path.unlink()
    file.path.parent.rmdir()
    file.append(b"two\n")
    file.append(b"three\n")
    assert file.path.read_bytes() == b"two\nthree\n"


def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path):
    (tmp_path / "log").write_text("whole\nhal")
    file = AppendedFile(tmp_path / "log", [].append)
    file.append(b"next\n")
    assert file.path.read_text() == "whole\nnext\n"


def test_a_link_stays_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "link").symlink_to("file")
    replace_file(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    replace_file(tmp_path / "pipe", "text")
    with replacing(tmp_path / "pipe") as beside:  # as a picture is written
        beside.write_bytes(b" and more")
    assert os.read(reading, 100) == b"text and more"
    os.close(reading)


def test_an_error_in_the_block_leaves_the_old_file(tmp_path):
    replace_file(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file") as beside:
        beside.write_text(f"new {1 / 0}")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
