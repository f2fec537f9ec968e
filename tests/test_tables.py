"""Tables on narrow consoles: every cell is printed whole, whatever the width."""

import io

import pytest
from rich.console import Console

from jaxtrain import tables
from jaxtrain.config.loading import load_config
from jaxtrain.hardware import find_chip
from jaxtrain.planner.answer import memory_table, ranking_table
from jaxtrain.planner.estimates import Cluster
from jaxtrain.planner.explain import explain
from jaxtrain.planner.search import search
from jaxtrain.text import open_console

CLUSTER = Cluster(find_chip("h100-sxm"), hosts=16)


def printed(table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), markup=False)
    tables.print_table(console, table)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def ranked():
    return search(load_config("configs/70b.py"), CLUSTER).ranked[:3]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 180])
@pytest.mark.parametrize("make", [lambda ranked: ranking_table(ranked, "title"), memory_table])
def test_no_cell_is_cut(ranked, make, width: int):
    table = make(ranked)
    text = printed(table, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    words = set(text.split())
    for column in table.columns:
        for cell in (str(column.header), *column.cells):
            assert set(str(cell).split()) <= words, (column.header, cell)


def test_a_wide_console_has_one_table_and_a_narrow_one_repeats_the_first_column(ranked):
    whole, cut = printed(memory_table(ranked), 180), printed(memory_table(ranked), 60)
    assert whole.count("Memory of the fullest device") == cut.count("Memory of the fullest device") == 1
    assert whole.count("#") == 1
    assert cut.count("#") > 1


def test_the_tables_of_an_explanation_fit(capsys: pytest.CaptureFixture[str]):
    config = load_config("configs/70b.py")
    explain(config, CLUSTER).show(Console(width=60))
    body = capsys.readouterr().out.split("schedule")[0]
    assert "…" not in body


def test_the_width_without_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert open_console(180).width == 180
    monkeypatch.setenv("COLUMNS", "77")
    assert open_console(180).width == 77
