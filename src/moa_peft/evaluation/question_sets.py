"""A question set as it is scored: its task, its rows, and the parts that are reported apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moa_peft.data import Example
from moa_peft.tasks import Task, train_twins


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """Questions to score.

    Attributes:
        name: what results call the set.
        task: how its answers look and how long they may be.
        examples: its questions.
        source: where they came from.
        parts: positions of questions that are reported apart as well, by the name of the part.
    """

    name: str
    task: Task
    examples: Sequence[Example]
    source: str
    parts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the questions and answers, to notice that a file has changed."""
        rows = [[example.question, example.reference, example.answer] for example in self.examples]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    @property
    def parts_digest(self) -> str:
        """SHA-256 of the parts, to notice that others are asked for."""
        parts = {name: list(indices) for name, indices in self.parts.items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def parts_by_twins(examples: Sequence[Example], train: Sequence[Example]) -> dict[str, list[int]]:
    """Questions that occur in the training rows with other numbers, and the rest; empty where there are none."""
    twins = train_twins(examples, train)
    if not any(twins):
        return {}
    return {
        "twins": [index for index, is_twin in enumerate(twins) if is_twin],
        "rest": [index for index, is_twin in enumerate(twins) if not is_twin],
    }
