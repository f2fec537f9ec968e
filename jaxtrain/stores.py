"""Open object stores and other file systems by URL, through fsspec; try again what may pass; say failures in one line."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from jaxtrain.errors import ExplainedError

DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each further attempt."""
_PACKAGES = {
    "s3": "'jaxtrain[s3]'",
    "s3a": "'jaxtrain[s3]'",
    "gs": "'jaxtrain[gcs]'",
    "gcs": "'jaxtrain[gcs]'",
    "hdfs": "'jaxtrain[data]', and give Hadoop's libhdfs and a Java runtime (HADOOP_HOME, CLASSPATH, JAVA_HOME)",
    "hf": "huggingface_hub",
    "abfs": "adlfs",
    "az": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "sftp": "paramiko",
}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where a role gives them",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run where a service account gives them",
    "hf": "set HF_TOKEN",
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError, TypeError)
_LASTING_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "NotImplementedError")
T = TypeVar("T")
log = logging.getLogger(__name__)


class StoreError(ExplainedError):
    """A store cannot be reached, or does not have what is asked for."""


def protocol_of(path: str) -> str:
    """Return the protocol of a URL, in lower case; empty for a path."""
    match = _URL.match(path)
    return match[1].lower() if match else ""


def open_store(url: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it.

    Raises StoreError for an unknown protocol, or where the package or library that speaks it is missing.
    """
    import fsspec

    protocol = protocol_of(url)
    try:
        return fsspec.url_to_fs(url, **options)
    except (ImportError, ValueError, OSError) as error:
        words = str(error).strip().splitlines()[0]
        package = _PACKAGES.get(protocol)
        raise StoreError(f"{words}; pip install {package}" if package else words) from error


def patiently(what: str, work: Callable[[], T]) -> T:
    """Return `work()`, tried again with growing delays unless its error is one that lasts, as a missing file.

    `what` is what it does, for the log. Raises the last error.
    """
    for delay in DELAYS:
        try:
            return work()
        except Exception as error:
            if _lasts(error):
                raise
            log.warning("%s: %s; trying again in %g s", what, first_line(error), delay)
            time.sleep(delay)
    return work()


def _lasts(error: Exception) -> bool:
    if isinstance(error, ExplainedError) or type(error).__name__ in _LASTING_NAMES:
        return True
    return isinstance(error, _LASTING) and not isinstance(error, TimeoutError)


def first_line(error: BaseException) -> str:
    """Return the class of an error, and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def explained(url: str, error: Exception) -> StoreError:
    """Return a store's own exception as one line, with the way out where it is known."""
    if isinstance(error, ExplainedError):
        return StoreError(str(error))
    protocol = protocol_of(url)
    if "Credentials" in type(error).__name__:
        way_out = _CREDENTIALS.get(protocol.removesuffix("a"), "give them as its fsspec package says")
        return StoreError(f"{url}: no credentials; {way_out}")
    words = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    if isinstance(error, FileNotFoundError):
        return StoreError(f"{url}: {words if 'exist' in words else 'there is no such file'}")
    if isinstance(error, PermissionError):
        return StoreError(f"{url}: access is denied ({words}); check the credentials and the store's policy")
    return StoreError(f"{url}: {first_line(error)}")
