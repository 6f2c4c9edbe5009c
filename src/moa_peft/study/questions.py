"""What a study asks of its runs."""

from __future__ import annotations

from dataclasses import dataclass

from moa_peft.study.records import is_accuracy


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One question of a study: a few rows against one, a family of tests of its own.

    Attributes:
        title: the question, as the heading of its table.
        baseline: the row that the others are compared with.
        rows: the others.
    """

    title: str
    baseline: str
    rows: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a study asks.

    Attributes:
        baseline: the row that all others are compared with.
        primary: the measure that decides.
        lower_is_better: whether a lower value of it is better.
        margin: differences of it that do not matter; None where every difference does.
        comparisons: the single questions; none makes all rows against the baseline one question.
    """

    baseline: str
    primary: str
    lower_is_better: bool
    margin: float | None = None
    comparisons: tuple[Comparison, ...] = ()

    def prefers_low(self, measure: str) -> bool:
        """Whether a lower value of a measure is better."""
        return self.lower_is_better if measure == self.primary else not is_accuracy(measure)

    def margin_of(self, measure: str) -> float | None:
        """The margin of a measure; only the primary one has one."""
        return self.margin if measure == self.primary else None
