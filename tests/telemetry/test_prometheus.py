"""The file for Prometheus: its format, held by hand and by Prometheus' own parser, and its replacement with each row."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from jaxtrain.config.run_rules import run_problems
from jaxtrain.telemetry.metrics import MetricsLog
from jaxtrain.telemetry.prometheus import exposition
from tests.tiny import tiny

NAME = 'a "run"\\of\nmine'


def test_the_format_is_that_of_prometheus():
    text = exposition({"jaxtrain_loss": 2.5, "jaxtrain_step": 10, "jaxtrain_a": math.nan, "jaxtrain_b": -math.inf}, NAME)
    label = r'{run="a \"run\"\\of\nmine"}'
    assert text == "".join(
        f"# TYPE jaxtrain_{key} gauge\njaxtrain_{key}{label} {value}\n"
        for key, value in {"loss": "2.5", "step": "10.0", "a": "NaN", "b": "-Inf"}.items()
    )


def test_its_own_parser_reads_the_file_of_a_run(tmp_path: Path):
    """The parser is that of the package prometheus_client, where that is installed."""
    parser = pytest.importorskip("prometheus_client.parser")
    file = tmp_path / "nodes" / "run.prom"
    config = tiny(telemetry={"prometheus": str(file)})
    with MetricsLog(tmp_path / "run", name=NAME, config=config) as log:
        log.write({"step": 1, "loss": 3.5, "mfu_full": None, "note": "words", "task_a-b_accuracy": 0.5})
        before = file.stat().st_ino
        log.write({"step": 2, "loss": math.inf})
        assert file.stat().st_ino != before  # replaced, not written into
    families = {family.name: family for family in parser.text_string_to_metric_families(file.read_text())}
    values = {name: family.samples[0].value for name, family in families.items()}
    assert values.pop("jaxtrain_time") > 1e9
    assert values == {"jaxtrain_step": 2, "jaxtrain_loss": math.inf, "jaxtrain_task_a_b_accuracy": 0.5}
    assert all(family.samples[0].labels == {"run": NAME} and family.type == "gauge" for family in families.values())
    assert [path.name for path in file.parent.iterdir()] == ["run.prom"]


def test_a_run_without_the_field_or_of_another_process_writes_none(tmp_path: Path):
    with MetricsLog(tmp_path / "run", config=tiny()) as log:
        log.write({"step": 1, "loss": 3.5})
    config = tiny(telemetry={"prometheus": str(tmp_path / "run.prom")})
    with MetricsLog(tmp_path / "other", process_index=1, config=config) as log:
        log.write({"step": 1, "loss": 3.5})
    assert not list(tmp_path.glob("**/*.prom"))


def test_a_name_that_the_collector_does_not_read_is_refused():
    config = tiny()
    wrong = replace(config, telemetry=replace(config.telemetry, prometheus="run.txt"))
    assert [problem for problem in run_problems(wrong) if "end in .prom" in problem]
    assert not [problem for problem in run_problems(config) if "end in .prom" in problem]
