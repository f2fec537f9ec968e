"""Write a run's newest figures as a text file for Prometheus: node_exporter's textfile collector reads it, Grafana draws it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain.files import ReplacedFiles, Say

SUFFIX = ".prom"
"""node_exporter reads files of no other name."""


class PrometheusWriter:
    """Keeps the newest number of each key, and replaces the file atomically with every row.

    Each is a gauge `jaxtrain_KEY{run="NAME"}`, under the names of metrics.jsonl. There are no times in the file, which the
    collector refuses: `jaxtrain_time` is that of the newest row.
    """

    def __init__(self, path: Path, run: str, say: Say):
        self._path, self._files = path, ReplacedFiles(say)
        self._run, self._newest = run, dict[str, float]()

    def write(self, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if isinstance(value, (int, float)):
                self._newest[f"jaxtrain_{re.sub('[^a-zA-Z0-9_]', '_', key)}"] = value
        self._files.write(self._path, exposition(self._newest, self._run))

    def close(self) -> None:
        self._files.retry()


def exposition(values: Mapping[str, float], run: str) -> str:
    """Return gauges in Prometheus' text format, version 0.0.4.

    Args:
      values: {metric name: value}.
      run: the label of all.
    """
    label = run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n").encode(errors="backslashreplace").decode()
    return "".join(f'# TYPE {name} gauge\n{name}{{run="{label}"}} {_number(value)}\n' for name, value in values.items())


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else "+Inf" if value > 0 else "-Inf"
