"""Check that every process can read the data, reads the same, and gets its rows of the first batch."""

from __future__ import annotations

import time
from typing import Any

from jaxtrain.data.pipeline import open_data
from jaxtrain.preflight.checks import Check, Finding, Site, odd_ones
from jaxtrain.train.feed import owned_rows
from jaxtrain.train.gradients import batch_sharding


def look_at_data(site: Site) -> dict[str, Any]:
    """Open the data (which checks every token) and read this process's rows of the first batch."""
    config, started = site.config, time.perf_counter()
    data = open_data(config)
    opened = time.perf_counter()
    rows = owned_rows(batch_sharding(site.mesh), (config.train.global_batch_size, config.data.sequence_length))
    batch = data.train_batch(0, rows)
    facts = {"fingerprint": data.fingerprint, "words": data.description, "open_seconds": opened - started}
    return facts | {"batch_seconds": time.perf_counter() - opened, "rows": int(batch["tokens"].shape[0])}


def judge_data(site: Site, seen: list[dict[str, Any]]) -> list[Finding]:
    """Compare the processes' data: with different data each would train on rows in its own order."""
    common, others = odd_ones([facts["fingerprint"] for facts in seen])
    if others:
        lines = [
            f"{site.name(i)} reads other data (fingerprint {value[:12]}): {seen[i]['words']}" for i, value in others.items()
        ]
        return [Finding("data", "failed", f"{line}; most have {common[:12]}") for line in lines]
    slowest = max(facts["batch_seconds"] for facts in seen)
    words = f"{seen[0]['words']}; opened in {max(f['open_seconds'] for f in seen):.1f} s, a batch takes {slowest:.3f} s"
    return [Finding("data", "ok", words, {"fingerprint": common, "batch_seconds": slowest})]


def checks() -> list[Check]:
    """Return the single data check."""
    return [Check("data", look_at_data, judge_data)]
