"""What a study asks of its runs."""

from __future__ import annotations

from dataclasses import dataclass

from moa_peft.study.records import is_accuracy
from moa_peft.study.spec import StudySpec


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


def prefers_low(measure: str) -> bool:
    """Whether a lower value of a measure is better."""
    return not is_accuracy(measure)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a study asks.

    Attributes:
        baseline: the row that all others are compared with.
        primary: the measure that decides.
        margin: differences of it that do not matter; None where every difference does.
        comparisons: the single questions; none makes all rows against the baseline one question.
    """

    baseline: str
    primary: str
    margin: float | None = None
    comparisons: tuple[Comparison, ...] = ()

    @classmethod
    def of(cls, spec: StudySpec) -> Question:
        """What a study's file asks."""
        comparisons = tuple(
            Comparison(title=asked.question, baseline=asked.baseline or spec.baseline, rows=asked.rows)
            for asked in spec.comparisons
        )
        return cls(baseline=spec.baseline, primary=spec.primary, margin=spec.margin, comparisons=comparisons)

    def margin_of(self, measure: str) -> float | None:
        """The margin of a measure; only the primary one has one."""
        return self.margin if measure == self.primary else None
