"""What a model made of one question, in the three ways of scoring, and the file that collects it.

A prediction file has one JSON object a line, with the question's position in its set as `index`. Lines are appended
batch by batch, so an interrupted evaluation goes on with the questions whose index is not there yet.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from moa_peft.errors import UserError


class Record(Protocol):
    """A line of a prediction file."""

    @property
    def index(self) -> int: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A generated answer.

    Attributes:
        index: position of the question in its set.
        question: the user's text.
        reference: the right answer, in the normal form of the set's answer format.
        output: the generated text, cut where the answer is over (whole where `legacy` answers are read too).
        answers: what each extraction reads from it, None for a miss; `strict`, `flexible`, and `legacy` if asked for.
        correct: whether each of them is right.
    """

    index: int
    question: str
    reference: str
    output: str
    answers: dict[str, str | None]
    correct: dict[str, bool]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An option chosen by likelihood.

    Attributes:
        index: position of the question in its set.
        question: the user's text.
        reference: the right option.
        choices: the options of this question.
        log_likelihoods: of each option's statement, natural logarithm.
        answers: under `choice` the option whose statement is likeliest, the first of several.
        correct: under `choice` whether it is right.
    """

    index: int
    question: str
    reference: str
    choices: tuple[str, ...]
    log_likelihoods: tuple[float, ...]
    answers: dict[str, str | None]
    correct: dict[str, bool]

    @property
    def is_tied(self) -> bool:
        """Whether several options are equally likely, and the first of them was taken."""
        return self.log_likelihoods.count(max(self.log_likelihoods)) > 1

    def is_possible(self) -> bool:
        """Whether the numbers are log-likelihoods, one for each option."""
        return len(self.choices) == len(self.log_likelihoods) and all(
            math.isfinite(value) and value <= 0 for value in self.log_likelihoods
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ReferenceLikelihood:
    """How likely the model finds a reference answer.

    Attributes:
        index: position of the question in its set.
        question: the user's text.
        nll: negative log-likelihood of the whole answer and its end mark, in nats.
        num_tokens: tokens of the answer, the end mark included.
    """

    index: int
    question: str
    nll: float
    num_tokens: int

    def is_possible(self) -> bool:
        """Whether the numbers are a negative log-likelihood and a number of tokens."""
        return self.num_tokens >= 1 and math.isfinite(self.nll) and self.nll >= 0

    @property
    def nll_per_token(self) -> float:
        """Nats per token of the answer."""
        return self.nll / self.num_tokens

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


KINDS = {"generate": Prediction, "loglikelihood": Choice, "nll": ReferenceLikelihood}
"""Ways of scoring, and what a prediction is under each."""


class PredictionFile:
    """The lines of one question set under one way of scoring."""

    def __init__(self, path: Path, kind: Callable[..., Record]) -> None:
        """Name the file and what its lines are; nothing is read or written yet."""
        self.path = path
        self._kind = kind

    def read(self) -> list[Any]:
        """All whole lines, sorted by index; a last line that was cut off by a kill is removed from the file.

        Raises:
            UserError: another line is damaged, or an index occurs twice.
        """
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
        records = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                records.append(_typed(self._kind(**json.loads(line))))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{str(self.path)!r} is damaged in line {number}: {error}.\n"
                    "Delete the file to score its questions again."
                ) from error
        indices = [record.index for record in records]
        if len(set(indices)) != len(indices):
            raise UserError(f"{str(self.path)!r} holds a question twice. Delete the file to score them again.")
        return sorted(records, key=lambda record: record.index)

    def append(self, records: Iterable[Record]) -> None:
        """Add lines at the end and make sure that they are on the disk."""
        text = "".join(json.dumps(record.to_dict(), ensure_ascii=False) + "\n" for record in records)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


def _typed(record: Any) -> Any:
    """A record whose fields are of their kinds, as far as JSON can tell; raises `TypeError` else."""
    for field in fields(record):
        value = getattr(record, field.name)
        name = str(field.type)
        kind = name.partition("[")[0]
        entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        allowed = next((kinds for ending, kinds in _ENTRIES.items() if name.endswith(ending)), (object,))
        # A truth value is an int to Python.
        if isinstance(value, bool) or not isinstance(value, _FIELDS[kind]):
            raise TypeError(f"{field.name} is {value!r}")
        if not all(isinstance(entry, allowed) for entry in entries):
            raise TypeError(f"{field.name} is {value!r}")
    return record


_FIELDS: dict[str, Any] = {"int": int, "str": str, "float": (int, float), "dict": dict, "tuple": (list, tuple)}
_ENTRIES: dict[str, tuple[type, ...]] = {
    "str | None]": (str, type(None)),
    "bool]": (bool,),
    "[str, ...]": (str,),
    "[float, ...]": (int, float),
}
