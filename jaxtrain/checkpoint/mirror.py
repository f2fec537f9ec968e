"""A second copy of a run's checkpoints in an object store (`checkpoint.mirror`), in case the shared file system is lost.

Process 0 uploads every committed step in the background, and a run whose folder holds no checkpoint downloads the newest one.
fsspec accesses the store: s3:// with s3fs, gs:// with gcsfs, and its other protocols. Credentials come from the environment.

    s3://bucket/run/1000/...               the files of the step's folder
    s3://bucket/run/1000/committed.json    written last: a step without it is incomplete
    s3://bucket/run/owner                  a random token, also stored in the run's own folder

Locally a rename commits a step; object stores have none, so there the mark does. Arrays are verified when they are restored.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtrain.checkpoint.retention import METRIC, best_steps, outdated
from jaxtrain.checkpoint.stored import COMMIT_MARK, PARTIAL, STEP_NAME, absolute
from jaxtrain.config import CheckpointConfig
from jaxtrain.errors import CheckpointError, cause
from jaxtrain.files import replace_file
from jaxtrain.stores import StoreError, open_store

OWNER = "owner"
"""A file with a random token, here (.owner) and in the store, so that a run does not touch another run's copies."""
UNDONE_MARK = "rolled_back.json"
"""The commit mark's name after the run was rolled back to before the step; the step's files stay."""
log = logging.getLogger(__name__)


class Unreachable(CheckpointError):
    """The store did not answer, or gave an unexpected answer."""


class Mirror:
    """Upload the steps of one run. Only process 0 uses it.

    Raises:
      CheckpointError: fsspec does not know the URL's protocol, or lacks a package for it.
    """

    def __init__(self, directory: os.PathLike | str, config: CheckpointConfig, metric: str = METRIC):
        self._directory, self._config, self._url = Path(absolute(directory)), config, config.mirror.rstrip("/")
        self._metric = metric
        try:
            own = {"auto_mkdir": True} if self._url.startswith("file:") else {}  # object stores have no folders to make
            self._store, self._root = open_store(self._url, **own)
        except StoreError as error:
            raise CheckpointError(f"checkpoint.mirror={self._url!r}: {error}") from error
        self._is_ours = False
        self._wanted: int | None = None
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def steps(self) -> list[int]:
        """Return the complete steps in the store, ascending."""
        return sorted(
            int(name) for name, files in self._folders().items() if STEP_NAME.fullmatch(name) and COMMIT_MARK in files
        )

    def open(self, fetch: bool) -> int | None:
        """Claim the mirror; with `fetch`, also take over another folder's copies, download the newest whole step and return it.

        Without `fetch`, an unreachable store is no error before the end of the run.

        Raises:
          CheckpointError: it holds another run's copies; or with `fetch`, it cannot be read completely.
        """
        try:
            with self._explained("cannot be reached"):
                self._claim(take_over=fetch)
        except Unreachable as error:
            if fetch:
                raise
            log.warning("%s", error)
        if not fetch:
            return None
        with self._explained("cannot be read"):
            steps = self.steps()
            if steps:
                self._fetch(steps[-1])
        return steps[-1] if steps else None

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Raise the store's own exceptions as `Unreachable`."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            raise Unreachable(f"checkpoint.mirror={self._url!r} {what}: {cause(error)}") from error

    def _claim(self, take_over: bool) -> None:
        here, there = self._directory / f".{OWNER}", f"{self._root}/{OWNER}"
        own = here.read_text(encoding="utf-8") if here.exists() else ""
        self._store.invalidate_cache()
        theirs = self._store.cat_file(there).decode() if self._store.exists(there) else ""
        if theirs and theirs != own and not take_over:
            raise CheckpointError(
                f"checkpoint.mirror={self._url!r} holds the copies of another run than {self._directory}; give another URL, or "
                "an empty --run_dir to go on with that run"
            )
        word = theirs or own or secrets.token_hex(8)
        if own != word:
            replace_file(here, word)
        if not theirs:
            self._store.pipe_file(there, word.encode())
        self._is_ours = True

    def probe(self, name: str, data: bytes) -> None:
        """Write an object, read it back and remove it.

        Raises:
          CheckpointError: one of these fails.
        """
        path = f"{self._root}/{name}"
        with self._explained("cannot be written"):
            self._store.pipe_file(path, data)
            same = self._store.cat_file(path) == data
            self._store.rm_file(path)
        if not same:
            raise CheckpointError(f"checkpoint.mirror={self._url!r}: what was written is not what is read back")

    def _fetch(self, step: int) -> None:
        partial = self._directory / f"{step}{PARTIAL}"
        sizes = self._folders()[str(step)]
        for name in sizes:
            if name.startswith("/") or ".." in Path(name).parts:
                raise CheckpointError(f"{self._url}/{step} holds {name!r}, which is not a valid file name in a checkpoint")
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
        self._store.get([f"{self._root}/{step}/{name}" for name in sizes], [str(partial / name) for name in sizes])
        if wrong := [name for name, size in sizes.items() if (partial / name).stat().st_size != size]:
            raise CheckpointError(
                f"{self._url}/{step}: {len(wrong)} files have the wrong size after download, first {wrong[0]}"
            )
        partial.rename(self._directory / str(step))

    def copy(self, step: int) -> None:
        """Queue a background upload of that committed step, unless the store has it. Only the newest queued step is kept."""
        with self._lock:
            self._wanted = step
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Wait for the uploads.

        Raises:
          CheckpointError: the newest step could not be uploaded.
        """
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()
        if self._failure is not None:
            raise CheckpointError(self._failure)

    def _work(self) -> None:
        while True:
            with self._lock:
                step, self._wanted = self._wanted, None
                if step is None:
                    self._thread = None
                    return
            try:
                self._upload(step)
                self._failure = None
            except Exception as error:
                self._failure = f"step {step} could not be copied to checkpoint.mirror={self._url!r}: {cause(error)}"
                log.warning("%s; the run's own folder has it, and the next one is tried", self._failure)

    def _upload(self, step: int) -> None:
        if not self._is_ours:
            self._claim(take_over=False)
        source, folders, mark = self._directory / str(step), self._folders(), f"{self._root}/{step}/{COMMIT_MARK}"
        for later in (int(name) for name in folders if STEP_NAME.fullmatch(name) and int(name) > step):
            if COMMIT_MARK in folders[str(later)]:  # the run was rolled back since
                self._store.mv(f"{self._root}/{later}/{COMMIT_MARK}", f"{self._root}/{later}/{UNDONE_MARK}")
        if COMMIT_MARK in folders.get(str(step), {}) and self._store.cat_file(mark) == (source / COMMIT_MARK).read_bytes():
            return
        if str(step) in folders:  # an interrupted copy, or one from before a rollback
            self._remove(step)
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
        names = [name for name in names if name != COMMIT_MARK]
        self._store.put([str(source / name) for name in names], [f"{self._root}/{step}/{name}" for name in names])
        here = {name: (source / name).stat().st_size for name in names}
        there = self._folders().get(str(step))
        if here != there:
            raise OSError("the store does not hold what was written to it")
        self._store.put_file(str(source / COMMIT_MARK), mark)
        best = best_steps(self._directory, self._config.keep_best, self._metric)
        for old in outdated(self.steps(), self._config.keep, self._config.keep_every, best):
            self._remove(old)

    def _remove(self, step: int) -> None:
        """Remove the commit mark first, so that a kill at any moment leaves the step complete or not counted."""
        mark = f"{self._root}/{step}/{COMMIT_MARK}"
        if self._store.exists(mark):
            self._store.rm_file(mark)
        self._store.rm(f"{self._root}/{step}", recursive=True)

    def _folders(self) -> dict[str, dict[str, int]]:
        """{folder: {path of a file in it: bytes}} of the store's current content."""
        self._store.invalidate_cache()
        found: dict[str, dict[str, int]] = {}
        files: dict[str, Any] = self._store.find(self._root, detail=True)
        for path, about in files.items():
            folder, _, name = path.removeprefix(self._root).lstrip("/").partition("/")
            if name:
                found.setdefault(folder, {})[name] = about["size"]
        return found
