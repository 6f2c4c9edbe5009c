"""Differences with their intervals, a panel for every table that judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa_peft.errors import UserError
from moa_peft.study.columns import heading
from moa_peft.study.drawing import check_format, import_matplotlib, save_figure
from moa_peft.study.questions import Question, prefers_low
from moa_peft.study.records import is_accuracy
from moa_peft.study.table_formats import StudyTable, Value

# Colours by Okabe and Ito; the shapes tell verdicts apart without them.
_STYLES = {
    "better": ("#009E73", "o"),
    "equivalent": ("#0072B2", "s"),
    "worse": ("#D55E00", "X"),
    "not resolved": ("0.45", "D"),
    "one seed": ("0.7", "o"),
}
_WIDTH_INCHES = 7.0
_ROW_INCHES = 0.28
_FRAME_INCHES = 0.95
_TITLE_CHARACTERS = 90


def plot_differences(tables: Sequence[StudyTable], path: Path, *, question: Question) -> None:
    """Draw every row's difference to its baseline, with the 95 % interval and the margin as a band.

    Args:
        tables: with verdicts, all of the primary measure; rows without a difference are left out, and so are tables
            without any.
        path: the file to write, ending in ``.png`` or ``.svg``.
        question: what the study asks.

    Raises:
        UserError: matplotlib is missing, the ending is another one, or no table has a difference.
    """
    matplotlib = import_matplotlib()
    check_format(path)
    panels = [(table.title, rows) for table in tables if (rows := judged_rows(table))]
    if not panels:
        raise UserError("differences: no two rows can be compared yet, so there is nothing to draw.")
    heights = [_FRAME_INCHES + _ROW_INCHES * len(rows) for _, rows in panels]
    figure = matplotlib.figure.Figure(figsize=(_WIDTH_INCHES, sum(heights)), dpi=150, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).flatten()
    first_of_data: dict[Value, Any] = {}
    for panel, (title, rows) in zip(axes, panels, strict=True):
        # Lengths can be compared within a data set.
        panel.sharex(first_of_data.setdefault(rows[0]["data"], panel))
        _draw(panel, rows, question)
        panel.set_title(_shortened(title), fontsize=9, loc="left")
    used = dict.fromkeys(str(row["verdict"]) for _, rows in panels for row in rows)
    handles = [
        matplotlib.lines.Line2D([], [], color=_STYLES[name][0], marker=_STYLES[name][1], linestyle="", label=name)
        for name in _STYLES
        if name in used
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        title="Verdicts follow p values that are corrected for the rows of a panel; the intervals are not.",
        title_fontsize=7,
    )
    save_figure(figure, path)


def judged_rows(table: StudyTable) -> list[Mapping[str, Value]]:
    """The rows of a table that have a difference and a verdict on it."""
    return [row for row in table.rows if row.get("difference") is not None and row.get("verdict") in _STYLES]


def _draw(panel: Any, rows: Sequence[Mapping[str, Any]], question: Question) -> None:
    scale = 100 if is_accuracy(question.primary) else 1
    for place, row in enumerate(rows):
        colour, shape = _STYLES[row["verdict"]]
        middle, low, high = (scale * row[key] for key in ("difference", "low", "high"))
        panel.errorbar(
            middle, place, xerr=[[middle - low], [high - middle]], color=colour, marker=shape, markersize=5, capsize=3
        )
    if question.margin is not None:
        panel.axvspan(-scale * question.margin, scale * question.margin, color="0.93", zorder=0)
    panel.axvline(0, color="0.3", linewidth=0.8, zorder=1)
    panel.set_yticks(range(len(rows)), [row["row"] for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    better = "left" if prefers_low(question.primary) else "right"
    band = "" if question.margin is None else "; grey: the margin"
    panel.set_xlabel(
        f"{heading(question.primary)}: row - {rows[0]['baseline']} ({better} is better{band})", fontsize=8
    )


def _shortened(title: str) -> str:
    return title if len(title) <= _TITLE_CHARACTERS else f"{title[: _TITLE_CHARACTERS - 3]}..."
