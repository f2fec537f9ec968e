"""The tables that verbs print, on consoles of any width: columns that do not fit go into tables below each other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def plain_table(title: str, left: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    """Return a table without lines except below the heads, of which those on the `right` stand above numbers."""
    look = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    table = Table(title=title, header_style="dim", **look)
    for head in (*left, *right):
        table.add_column(head, justify="right" if head in right else "left")
    return table


def print_table(console: Console, table: Table) -> None:
    """Print a table; if wider than the console, in parts that fit, each with the first column.

    The title is a line of its own: a table's is wrapped at the width of its columns.
    """
    if table.title:
        console.print(table.title, style="bold", soft_wrap=not console.is_terminal)
    for part in split_columns(table, console):
        console.print(part)


def split_columns(table: Table, console: Console) -> Iterator[Table]:
    """Yield the columns in order, as many per table as fit beside the first one."""
    rest = list(range(1, len(table.columns)))
    while rest:
        count = len(rest)
        while count > 1 and _width(_part(table, [0, *rest[:count]]), console) > console.width:
            count -= 1
        part = _part(table, [0, *rest[:count]])
        rest = rest[count:]
        part.caption = None if rest else table.caption
        yield part


def _width(table: Table, console: Console) -> int:
    """Return the smallest width at which no cell is cut."""
    return Measurement.get(console, console.options.update_width(10_000), table).minimum


def _part(table: Table, indices: Sequence[int]) -> Table:
    """Return some of a table's columns as a table of the same style, without the title."""
    part = copy.copy(table)
    part.title, part.columns = None, []
    for place, column in enumerate(table.columns[i] for i in indices):
        lines = [line for cell in (column.header, *column.cells) for line in str(cell).splitlines()]
        least = max(map(cell_len, lines), default=0) if column.no_wrap else column.min_width
        part.columns.append(replace(column, min_width=least, overflow="fold", _index=place))
    return part
