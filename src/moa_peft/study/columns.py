"""The columns of a study's tables."""

from __future__ import annotations

from moa_peft.study.records import is_accuracy
from moa_peft.study.table_formats import PLUS_MINUS, Column

ROW = Column(title="row", keys=("row",), width=20)
METHOD = Column(title="method", keys=("method",), priority=9)
SEEDS = Column(
    title="seeds",
    keys=("seeds", "seeds_asked"),
    text=lambda seeds, asked: str(seeds) if seeds == asked else f"{seeds} of {asked}",
    kind="number",
    priority=3,
)
PARAMETERS = Column(title="parameters", keys=("trainable_parameters",), text="{:,}".format, kind="formula", priority=1)
STEP_TIME = Column(
    title="s/step", keys=("step_seconds",), text="{:.3g}".format, kind="formula", best="low", priority=6
)
P_VALUE = Column(title="p (Holm)", keys=("p_holm",), text="{:.2g}".format, kind="number", priority=4)
VERDICT = Column(title="verdict", keys=("verdict",), width=8)


def learning_rate(value: float | str) -> str:
    """A learning rate, or several as a text, for a reader."""
    return value if isinstance(value, str) else f"{value:.3g}"


LEARNING_RATE = Column(title="learning rate", keys=("learning_rate",), text=learning_rate, kind="number", priority=8)
MEMORY = Column(
    title="memory GiB",
    keys=("peak_memory_bytes",),
    text=lambda value: f"{value / 2**30:.2f}",
    kind="formula",
    best="low",
    priority=7,
)


def mean_column(measure: str, *, title: str | None = None, prefix: str = "", low: bool, priority: int = 0) -> Column:
    """Mean and deviation over seeds.

    Args:
        measure: which measure; accuracies are written in percent.
        title: the heading; the measure's name without one.
        prefix: of the keys `mean` and `deviation`.
        low: whether the lowest is the best.
        priority: see `Column`.
    """
    return Column(
        title=heading(measure) if title is None else title,
        keys=(f"{prefix}mean", f"{prefix}deviation"),
        text=lambda mean, deviation: (
            number(measure, mean) + ("" if deviation is None else f" {PLUS_MINUS} {number(measure, deviation)}")
        ),
        kind="formula",
        best="low" if low else "high",
        priority=priority,
    )


def difference_column(measure: str) -> Column:
    """A difference with its interval."""
    return Column(
        title="difference [95%]",
        keys=("difference", "low", "high"),
        text=lambda difference, low, high: (
            f"{number(measure, difference, sign='+')} "
            f"[{number(measure, low, sign='+')}, {number(measure, high, sign='+')}]"
        ),
        kind="formula",
    )


def heading(measure: str) -> str:
    """A measure's name with its unit."""
    return f"{measure.replace('_', ' ')} %" if is_accuracy(measure) else measure


def number(measure: str, value: float, *, sign: str = "") -> str:
    """A value of a measure: percent with one digit, or four digits."""
    return f"{100 * value:{sign}.1f}" if is_accuracy(measure) else f"{value:{sign}.4f}"
