"""A run's folder and its compilation cache, where the disk takes nothing."""

import errno
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxtrain.errors import ExplainedError
from jaxtrain.train import run_dir
from jaxtrain.train.run_dir import compilation_cache, largest_before, make_run_dir, only_run_in
from tests.conftest import ERRNOS
from tests.train.runs import Said


@pytest.fixture(params=ERRNOS, ids=errno.errorcode.get)
def fail(request):
    def fail(*arguments, **options):
        raise OSError(request.param, os.strerror(request.param))

    return fail


def test_the_lock_holds_without_its_owners_name(tmp_path, monkeypatch, fail):
    make_run_dir(tmp_path)
    monkeypatch.setattr(Path, "write_text", fail)
    with only_run_in(tmp_path), pytest.raises(ExplainedError, match="another process is training in"), only_run_in(tmp_path):
        pass


def test_rows_that_cannot_be_read_count_for_nothing(tmp_path, monkeypatch, fail):
    monkeypatch.setattr(run_dir, "read_rows", fail)
    assert largest_before(tmp_path / "metrics.jsonl", 7, "elapsed_seconds") == 0.0


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path, monkeypatch, fail):
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(ExplainedError, match="--run_dir=.* cannot be written: .*; give another --run_dir"):
        make_run_dir(tmp_path / "run")


CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")


def cache_settings():
    return [getattr(jax.config, name) for name in CACHE]


def mesh_of(platform, pipe):
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]), shape={"pipe": pipe})


def test_a_full_compilation_cache_is_told_once_and_not_for_each_program(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    said = Said()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with compilation_cache(mesh_of("cpu", 1), str(tmp_path), said.say):
            warnings.warn("Error writing persistent compilation cache entry for 'jit_f': OSError: No space", stacklevel=1)
            warnings.warn("another warning", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another warning"]
    assert said.lines == [
        f"warning    compilation cache: {tmp_path} has 1000 B of free space; the next start may have to compile again"
    ]


@pytest.mark.parametrize(("platform", "pipe", "is_used"), [("cpu", 1, True), ("cuda", 2, True), ("cpu", 2, False)])
def test_the_compilation_cache_is_used_where_it_is_safe_and_left_as_it_was(tmp_path, platform, pipe, is_used):
    before = cache_settings()
    with compilation_cache(mesh_of(platform, pipe), str(tmp_path)):
        assert cache_settings() == ([str(tmp_path), 0.0, True] if is_used else [*before[:2], False])
    assert cache_settings() == before
