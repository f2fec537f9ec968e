"""The processes of a run, and a few words between them that are on no device: JAX's coordination service as a notice board.

A lone process has no board; its callers see `post` succeed and `look` find nothing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

from jaxtrain.config import Config
from jaxtrain.errors import ConfigError, ExplainedError
from jaxtrain.jax_private import distributed_state

_PREFIX = "jaxtrain/"
_TO_THE_DOOR = 0.5  # seconds from saying that one leaves to having left: jax aborts whom the end of the board still finds


def _client() -> Any | None:
    return distributed_state().client


def _own_index() -> int:
    return int(distributed_state().process_id or 0)


def _count() -> int:
    return int(distributed_state().num_processes or 1)


def are_several() -> bool:
    """Whether this process is one of a run of several."""
    return _client() is not None and _count() > 1


def post(key: str, value: str) -> bool:
    """Puts up a notice, for all processes and for good; False where somebody else has been first."""
    client = _client()
    if client is None:
        return True
    try:
        client.key_value_set(_PREFIX + key, value)
    except Exception as error:
        if "ALREADY_EXISTS" in str(error):
            return False
        raise
    return True


def look(key: str) -> str | None:
    """The notice under a key, or None."""
    client = _client()
    if client is None:
        return None
    try:
        return client.key_value_try_get(_PREFIX + key)
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def tell(key: str, value: str) -> None:
    """Puts up a notice in place of what this key said before."""
    client = _client()
    if client is not None:
        client.key_value_set(_PREFIX + key, value, allow_overwrite=True)


def read_board(folder: str) -> dict[str, str]:
    """All notices under "folder/", by what follows; those that are there, without waiting for any."""
    client = _client()
    if client is None:
        return {}
    prefix = f"{_PREFIX}{folder}/"
    return {key.removeprefix(prefix): value for key, value in client.key_value_dir_get(prefix)}


def wait_for(key: str, seconds: float) -> str:
    """The notice under a key, once it is there.

    Raises:
      ExplainedError: nobody put it up in time.
    """
    client = _client()
    assert client is not None, "a lone process waits for nobody"
    try:
        return client.blocking_key_value_get(_PREFIX + key, int(seconds * 1000))
    except Exception as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise ExplainedError(f"no other process said {key!r} within {seconds:.0f} s; see their logs") from error


def exchange(name: str, value: Any, seconds: float) -> list[Any]:
    """What every process says under a name, by process, as JSON gives it back. All call it; a name serves once.

    Process 0 gathers and hands out, so that n processes send 2 n messages.

    Raises:
      ExplainedError: a process said nothing in time; names it.
    """
    if not are_several():
        return [json.loads(json.dumps(value))]
    own, count = _own_index(), _count()
    post(f"{name}/{own}", json.dumps(value))
    if own == 0:
        post(f"{name}/all", json.dumps(_gather(name, count, seconds)))
    said = json.loads(wait_for(f"{name}/all", seconds + 10))  # process 0 has words for who is missing
    if isinstance(said, str):
        raise ExplainedError(said)
    return said


def leave(name: str, seconds: float) -> None:
    """Before the processes end for different reasons, or with an error: process 0, on which the board is, goes last."""
    if not are_several():
        return
    own, count = _own_index(), _count()
    if own == 0:
        _gather(name, count, seconds, first=1)
        time.sleep(_TO_THE_DOOR)
    else:
        post(f"{name}/{own}", "null")


def _gather(name: str, count: int, seconds: float, first: int = 0) -> list[Any] | str:
    """What all have said, or in words who has not."""
    until, said = time.monotonic() + seconds, []
    for index in range(first, count):
        try:
            said.append(json.loads(wait_for(f"{name}/{index}", max(until - time.monotonic(), 0.1))))
        except ExplainedError:
            return f"process {index} of {count} said nothing about {name!r} within {seconds:.0f} s; see its log"
    return said


def check_same_config(config: Config) -> None:
    """Compares this process's config with that of process 0, before anything is computed together.

    Raises:
      ConfigError: they differ; names the fields, with both values.
    """
    import jax

    mine = _flat(dataclasses.asdict(config))
    if jax.process_index() == 0:
        post("config", json.dumps(mine))
        return
    first = json.loads(wait_for("config", config.distributed.start_timeout_seconds))
    names = [name for name in {**first, **mine} if first.get(name) != mine.get(name) and name != "distributed.process_id"]
    if names:
        raise ConfigError(
            [
                f"{name}={mine.get(name)!r} in process {jax.process_index()}, but {first.get(name)!r} in process 0"
                for name in names
            ]
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as {"model.num_layers": 12}."""
    if isinstance(value, dict | list | tuple) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, inner in items for key, leaf in _flat(inner, f"{name}.{part}".lstrip(".")).items()}
    return {name: list(value) if isinstance(value, tuple) else value}
