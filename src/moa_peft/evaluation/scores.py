"""Counts, shares and means over the predictions of a question set, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from moa_peft.evaluation.predictions import KINDS, Choice, Prediction, ReferenceLikelihood
from moa_peft.intervals import Interval, mean_interval, share_interval


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of right answers under one extraction.

    Attributes:
        num_items: questions.
        correct: questions answered rightly.
        missing: questions from whose text no answer could be read; they count as wrong.
        interval: 95 % interval of `value`, see `share_interval`.
    """

    num_items: int
    correct: int
    missing: int
    interval: Interval

    @property
    def value(self) -> float:
        """The share."""
        return self.correct / self.num_items

    def to_dict(self) -> dict[str, Any]:
        """Counts, share and interval."""
        return {
            "correct": self.correct,
            "missing": self.missing,
            "accuracy": self.value,
            "interval_95": asdict(self.interval),
        }


AnyPrediction = TypeVar("AnyPrediction", Prediction, Choice)


@dataclass(frozen=True)
class Score(Generic[AnyPrediction]):
    """The predictions of one question set, in the order of its rows, and what they amount to."""

    predictions: Sequence[AnyPrediction]

    @property
    def num_items(self) -> int:
        """Number of questions."""
        return len(self.predictions)

    @property
    def modes(self) -> tuple[str, ...]:
        """The ways in which answers were read: `strict`, `flexible`, perhaps `legacy`; or `choice`."""
        return tuple(self.predictions[0].answers)

    def correct(self, mode: str) -> list[bool]:
        """Whether each question is answered rightly."""
        return [prediction.correct[mode] for prediction in self.predictions]

    def accuracy(self, mode: str) -> Accuracy:
        """Share of right answers."""
        correct = self.correct(mode)
        missing = sum(prediction.answers[mode] is None for prediction in self.predictions)
        return Accuracy(
            num_items=self.num_items, correct=sum(correct), missing=missing, interval=share_interval(correct)
        )

    def to_dict(self) -> dict[str, Any]:
        """Counts, shares and intervals of every mode, without the predictions; of choices also the undecided ones."""
        ties = [prediction.is_tied for prediction in self.predictions if isinstance(prediction, Choice)]
        counts = {"num_items": self.num_items, **({"ties": sum(ties)} if ties else {})}
        return {**counts, **{mode: self.accuracy(mode).to_dict() for mode in self.modes}}


def mean_nll(results: Sequence[ReferenceLikelihood]) -> dict[str, Any]:
    """Means over reference answers.

    Args:
        results: of the questions of a set.

    Returns:
        `nll`, the mean over questions of nats per token of the answer, with its interval; `nll_per_answer`, the mean
        of the whole answers' nats; and the number of questions and tokens.
    """
    values = [result.nll_per_token for result in results]
    return {
        "num_items": len(results),
        "num_tokens": sum(result.num_tokens for result in results),
        "nll": sum(values) / len(values),
        "interval_95": asdict(mean_interval(values)),
        "nll_per_answer": sum(result.nll for result in results) / len(results),
    }


def suite_means(suites: Mapping[str, str], results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Unweighted means over the sets of every suite that has several.

    Args:
        suites: the suite of every set.
        results: by set and way of scoring, as `score_sets` returns them.

    Returns:
        By suite the names of its `sets`, and the measures that all of them have.
    """
    means: dict[str, dict[str, Any]] = {}
    for suite in dict.fromkeys(suites.values()):
        names = [name for name, own in suites.items() if own == suite]
        measures: dict[str, list[float]] = {}
        for name in names:
            for scoring in KINDS.keys() & results[name].keys():
                for measure, value in _values(scoring, results[name][scoring]).items():
                    measures.setdefault(measure, []).append(value)
        whole = {measure: sum(v) / len(v) for measure, v in measures.items() if len(v) == len(names)}
        if len(names) > 1 and whole:
            means[suite] = {"sets": names, **dict(sorted(whole.items()))}
    return means


def _values(scoring: str, content: Mapping[str, Any]) -> dict[str, float]:
    if scoring == "nll":
        return {"nll": content["nll"]}
    return {
        f"{scoring}.{mode}": c["accuracy"] for mode, c in content.items() if isinstance(c, dict) and "accuracy" in c
    }
