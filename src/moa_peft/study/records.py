"""What a finished run of a study leaves behind: its costs and its per-item scores, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moa_peft.errors import UserError
from moa_peft.fields import build_options

PRIMARY_MEASURES = ("nll", "accuracy_flexible", "accuracy_strict", "accuracy")
TWINS_SUFFIX = " (twins)"
REST_SUFFIX = " (rest)"
_REASON_CHARACTERS = 120
TRANSFER_SUFFIX = " (transfer)"


@dataclass(frozen=True, kw_only=True)
class ItemScores:
    """Per-item values of one measure on one question set, in the order of its rows.

    Attributes:
        task: name of the question set; ``"MultiArith (twins)"`` or ``"MultiArith (rest)"`` for a part apart,
            ``"piqa (transfer)"`` for a set whose kind of question does not occur in training.
        measure: ``nll`` (nats per answer token), ``accuracy_flexible``, ``accuracy_strict``, or ``accuracy`` (the
            choice of highest likelihood).
        items: stable ids, to pair runs by.
        values: one number for each item; accuracies lie in [0, 1].

    Raises:
        UserError: no items, an item twice, not as many values as items, or a value that cannot be averaged.
    """

    task: str
    measure: str
    items: tuple[str, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        where = f"scores of {self.task!r}, {self.measure!r}"
        _check_types(self, {"task": str, "measure": str, "items": tuple, "values": tuple}, where=where)
        if not self.items or len(self.items) != len(self.values):
            raise UserError(
                f"{where}: {len(self.items)} items with {len(self.values)} values; every item needs one value, and "
                "there must be at least one. Score the run again."
            )
        if len(set(self.items)) != len(self.items):
            twice = next(item for item in self.items if self.items.count(item) > 1)
            raise UserError(
                f"{where}: the item {twice!r} occurs twice; ids must be unique, because runs pair by them."
            )
        high = 1.0 if is_accuracy(self.measure) else math.inf
        low = 0.0 if is_accuracy(self.measure) else -math.inf
        for item, value in zip(self.items, self.values, strict=True):
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if not (number and low <= value <= high):
                raise UserError(
                    f"{where}: the value of item {item!r} is {value!r}; allowed are finite numbers"
                    f"{' from 0 to 1' if high == 1 else ''}. A run that diverged has no scores: list it as missing."
                )


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One finished run.

    Attributes:
        row: the row of the study it belongs to.
        data: the data set it was trained on.
        seed: its seed.
        method: name of the method.
        learning_rate: the peak learning rate.
        steps: optimizer steps.
        tokens: tokens seen, over all steps.
        rows_seen: training rows seen, over all steps.
        trainable_parameters: number of trained numbers; 0 for a model that was only scored.
        peak_memory_bytes: largest memory use of the training, None where it was not measured.
        step_seconds: time of a step, None where it was not measured.
        validation_loss: loss on the validation rows, None where there are none.
        scores: the per-item scores, one entry for each question set and measure.

    Raises:
        UserError: a field has the wrong type, a count is negative, or a question set and measure occur twice.
    """

    row: str
    data: str
    seed: int
    method: str
    learning_rate: float
    steps: int
    tokens: int
    rows_seen: int
    trainable_parameters: int
    peak_memory_bytes: int | None
    step_seconds: float | None
    validation_loss: float | None
    scores: tuple[ItemScores, ...]

    def __post_init__(self) -> None:
        where = f"run of row {self.row!r} on {self.data!r}, seed {self.seed!r}"
        _check_types(self, _RUN_TYPES, where=where)
        for name in ("steps", "tokens", "rows_seen", "trainable_parameters"):
            if getattr(self, name) < 0:
                raise UserError(f"{where}: {name} is {getattr(self, name)}; it must be at least 0.")
        keys = [(scores.task, scores.measure) for scores in self.scores]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UserError(f"{where}: the scores of {twice[0]!r}, {twice[1]!r} occur twice; give them once.")

    def find_scores(self, *, task: str, measure: str) -> ItemScores | None:
        """The scores of one measure on one question set, None where the run has none."""
        return next((s for s in self.scores if (s.task, s.measure) == (task, measure)), None)

    def to_dict(self) -> dict[str, Any]:
        """All fields as numbers, texts, lists and dictionaries, for a JSON file."""
        fields = asdict(self)
        fields["scores"] = [
            {**scores, "items": list(scores["items"]), "values": list(scores["values"])} for scores in fields["scores"]
        ]
        return fields

    @classmethod
    def from_dict(cls, content: Any, *, source: str) -> RunRecord:
        """The record that `to_dict` wrote.

        Args:
            content: what the JSON file holds.
            source: the file, as messages name it.

        Raises:
            UserError: the content is not that of a record; the message names the file and what is wrong.
        """
        try:
            record = dict(_mapping(content, where="the content"))
            record["scores"] = tuple(
                build_options(
                    ItemScores,
                    {
                        name: tuple(value) if isinstance(value, list) else value
                        for name, value in _mapping(scores, where=f"scores[{index}]").items()
                    },
                    where=f"scores[{index}]",
                )
                for index, scores in enumerate(_list(record.get("scores")))
            )
            return build_options(cls, record, where="the record")
        except UserError as error:
            raise UserError(f"{source}: {error}\nThe file is damaged; delete it and run this part again.") from error


@dataclass(frozen=True, kw_only=True)
class MissingRun:
    """A run that was asked for and did not finish.

    Attributes:
        row: the row of the study.
        data: the data set.
        seed: the seed.
        reason: what happened, in a few words.
    """

    row: str
    data: str
    seed: int
    reason: str = "not finished"


def missing_sentences(missing: Iterable[MissingRun], *, rows: Sequence[str]) -> list[str]:
    """One sentence for the runs of a row that are missing for one reason, in the order of the rows."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for run in sorted(missing, key=lambda run: (rows.index(run.row), run.seed)):
        seeds.setdefault((run.row, _short(run.reason)), []).append(run.seed)
    return [
        f"Missing: {row}, seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))} ({reason})."
        for (row, reason), found in seeds.items()
    ]


def _short(reason: str) -> str:
    text = " ".join(reason.split())
    return text if len(text) <= _REASON_CHARACTERS else f"{text[: _REASON_CHARACTERS - 3].rstrip()}..."


def named_transfer(record: RunRecord, transfer: Collection[str]) -> RunRecord:
    """The record with the question sets in `transfer`, and their parts, named as such."""
    scores = [
        replace(scores, task=f"{scores.task}{TRANSFER_SUFFIX}")
        if scores.task.partition(" (")[0] in transfer
        else scores
        for scores in record.scores
    ]
    return replace(record, scores=tuple(scores))


def is_accuracy(measure: str) -> bool:
    """Whether a measure is a share of right answers: higher is better, and it is shown in percent."""
    return measure.startswith("accuracy")


def averaged_tasks(records: Iterable[RunRecord], *, measure: str) -> tuple[str, ...]:
    """The question sets that an average over tasks covers, in the order of their first appearance.

    Twins of training questions stay apart: a part named ``X (twins)`` does not count, and where ``X (rest)`` was
    scored, it counts instead of ``X``. ``X (transfer)`` and its parts never count.
    """
    tasks = scored_tasks(records, measure=measure)
    return tuple(
        task
        for task in tasks
        if not task.endswith(TWINS_SUFFIX) and TRANSFER_SUFFIX not in task and f"{task}{REST_SUFFIX}" not in tasks
    )


def scored_tasks(records: Iterable[RunRecord], *, measure: str) -> tuple[str, ...]:
    """All question sets scored by `measure`, in the order of their first appearance."""
    return tuple(dict.fromkeys(s.task for record in records for s in record.scores if s.measure == measure))


def scored_measures(records: Iterable[RunRecord]) -> tuple[str, ...]:
    """All measures, in the order of their first appearance."""
    return tuple(dict.fromkeys(s.measure for record in records for s in record.scores))


_RUN_TYPES: dict[str, type | tuple[type, ...]] = {
    "row": str,
    "data": str,
    "seed": int,
    "method": str,
    "learning_rate": (int, float),
    "steps": int,
    "tokens": int,
    "rows_seen": int,
    "trainable_parameters": int,
    "peak_memory_bytes": (int, type(None)),
    "step_seconds": (int, float, type(None)),
    "validation_loss": (int, float, type(None)),
    "scores": tuple,
}


def _check_types(owner: object, types: dict[str, type | tuple[type, ...]], *, where: str) -> None:
    for name, allowed in types.items():
        value = getattr(owner, name)
        finite = not isinstance(value, float) or math.isfinite(value)
        if isinstance(value, bool) or not isinstance(value, allowed) or not finite:
            kinds = allowed if isinstance(allowed, tuple) else (allowed,)
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise UserError(f"{where}: {name} is {value!r}; it must be a finite {names}.")


def _mapping(content: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where} is {type(content).__name__}; it must be an object with named fields.")
    return content


def _list(content: Any) -> Sequence[Any]:
    if not isinstance(content, list):
        raise UserError(f"scores is {type(content).__name__}; it must be a list.")
    return content
