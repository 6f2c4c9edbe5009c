"""A table as plain data, and its forms: Markdown, CSV, LaTeX and the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

Value = str | int | float | None

PLUS_MINUS = "\u00b1"
NOTHING = "-"

_LATEX_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        # After the end of a row, these two would be read as its arguments.
        "[": "{[}",
        "*": "{*}",
        PLUS_MINUS: r"$\pm$",
        "\n": " ",
    }
)
_MATH = str.maketrans({PLUS_MINUS: r"\pm", ",": "{,}"})


@dataclass(frozen=True, kw_only=True)
class Column:
    """How one column is made of a row's values.

    Attributes:
        title: its heading.
        keys: the values it shows; where the first is None, nothing is shown.
        text: from these values to the text.
        kind: `text`; `number`, which is aligned to the right; `formula`, a number that LaTeX sets as mathematics.
        best: whether the lowest or the highest first value is the best one; None where there is no best.
        priority: a terminal that is too narrow loses the columns with the highest first; 0 is never lost.
        width: characters in a terminal, where longer texts go on below; None for as many as needed.
    """

    title: str
    keys: tuple[str, ...]
    text: Callable[..., str] = str
    kind: Literal["text", "number", "formula"] = "text"
    best: Literal["low", "high"] | None = None
    priority: int = 0
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """A table before it is written.

    Attributes:
        title: what it is about.
        columns: what is shown, in order.
        rows: the numbers by key, unrounded; more than the columns show.
        notes: sentences below the table.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Value], ...]
    notes: tuple[str, ...]

    def cell(self, row: Mapping[str, Value], column: Column) -> str:
        """The text of one cell, `-` where there is no value."""
        values = [row.get(key) for key in column.keys]
        return NOTHING if values[0] is None else column.text(*values)

    def is_best(self, row: Mapping[str, Value], column: Column) -> bool:
        """Whether the cell shows the best value of its column; several may."""
        values = [other[column.keys[0]] for other in self.rows if other.get(column.keys[0]) is not None]
        if column.best is None or row.get(column.keys[0]) is None:
            return False
        best: Any = min if column.best == "low" else max
        return row[column.keys[0]] == best(values)


def to_markdown(table: StudyTable) -> str:
    """A GitHub table under a heading, the notes below it as a list."""
    lines = [f"## {_one_line(table.title)}", "", _markdown_line([column.title for column in table.columns])]
    lines.append("|" + "|".join("---" if column.kind == "text" else "---:" for column in table.columns) + "|")
    lines += [_markdown_line([table.cell(row, column) for column in table.columns]) for row in table.rows]
    if table.notes:
        lines += ["", *(f"- {_one_line(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def to_csv(tables: Sequence[StudyTable]) -> str:
    """The rows of all tables under one heading, numbers in full precision, empty where there is no value."""
    keys = dict.fromkeys(key for table in tables for row in table.rows for key in row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["table", *keys], lineterminator="\n")
    writer.writeheader()
    for table in tables:
        writer.writerows({"table": table.title, **row} for row in table.rows)
    return stream.getvalue()


def to_latex(table: StudyTable) -> str:
    r"""A `table` environment with the best value of each column in bold; the document loads `booktabs`."""
    lines = [
        r"% Needs \usepackage{booktabs}.",
        r"\begin{table}[htbp]",
        r"\centering",
        rf"\caption{{{_latex(table.title)}}}",
        r"\scriptsize",
        r"\setlength{\tabcolsep}{3pt}",
        rf"\begin{{tabular}}{{{''.join('l' if column.kind == 'text' else 'r' for column in table.columns)}}}",
        r"\toprule",
        " & ".join(_latex(column.title) for column in table.columns) + r" \\",
        r"\midrule",
        *(" & ".join(_latex_cell(table, row, column) for column in table.columns) + r" \\" for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if table.notes:
        notes = " ".join(_latex(note) for note in (*table.notes, "Bold: the best value of a column, resolved or not."))
        lines += [r"\par\smallskip", rf"\begin{{minipage}}{{\linewidth}}{notes}\end{{minipage}}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def to_rich(table: StudyTable, *, width: int = 100) -> Table:
    """A table for the terminal; columns that do not fit in `width` are left out and named below it."""
    dropped: list[str] = []
    console = Console(width=width)
    rendered = _rich(table, dropped=dropped)
    while Measurement.get(console, console.options.update(max_width=10_000), rendered).maximum > width:
        last = max(table.columns, key=lambda column: column.priority)
        if last.priority == 0:
            break
        dropped.append(last.title)
        table = replace(table, columns=tuple(column for column in table.columns if column is not last))
        rendered = _rich(table, dropped=dropped)
    return rendered


def _rich(table: StudyTable, *, dropped: Sequence[str]) -> Table:
    notes = [*table.notes, *([f"Columns that do not fit here: {', '.join(dropped)}."] if dropped else [])]
    rendered = Table(
        title=escape(table.title),
        caption=escape("\n".join(notes)),
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in table.columns:
        is_text = column.kind == "text"
        rendered.add_column(
            escape(column.title if is_text else column.title.replace(" ", "\n")),
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            max_width=column.width,
            overflow="fold",
        )
    for row in table.rows:
        cells = [(escape(table.cell(row, column)), table.is_best(row, column)) for column in table.columns]
        rendered.add_row(*(f"[bold]{text}[/bold]" if is_best else text for text, is_best in cells))
    return rendered


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_one_line(cell).replace("|", r"\|") for cell in cells) + " |"


def _latex(text: str) -> str:
    return text.translate(_LATEX_ESCAPES)


def _latex_cell(table: StudyTable, row: Mapping[str, Value], column: Column) -> str:
    text, is_best = table.cell(row, column), table.is_best(row, column)
    if column.kind == "formula" and text != NOTHING:
        formula = text.translate(_MATH)
        return rf"$\mathbf{{{formula}}}$" if is_best else f"${formula}$"
    return rf"\textbf{{{_latex(text)}}}" if is_best else _latex(text)
