"""The question sets that papers on adapters report, as data: their names, answers and lengths.

Names are those of the folders of LLM-Adapters (https://github.com/AGI-Edgerunners/LLM-Adapters), whose format the rows
have: `instruction`, `input`, `output`, `answer`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal

from moa_peft.answers import AnswerFormat
from moa_peft.data import Example
from moa_peft.errors import UserError

Suite = Literal["math", "commonsense", "own"]

_FORMAT_LINE = re.compile(r"answer format:\s*(\S+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question set.

    Attributes:
        name: as LLM-Adapters calls its folder.
        suite: the group that is reported together.
        format: how its answers look.
        max_new_tokens: upper limit of a generated answer.
        version: raised whenever scores would move, because of the rows, the extraction or the limit.
    """

    name: str
    suite: Suite
    format: AnswerFormat
    max_new_tokens: int
    version: int = 1

    def row_choices(self, example: Example) -> tuple[str, ...]:
        """The labels that one row offers, in order.

        ARC has 3 to 5 answers a question; the last line of an instruction says which: "Answer format:
        answer1/answer2/answer3". A row without such a line offers all choices of the task.
        """
        lines = example.question.strip().splitlines()
        stated = _FORMAT_LINE.fullmatch(lines[-1].strip()) if lines else None
        labels = tuple(stated[1].split("/")) if stated else ()
        return labels if labels and set(labels) <= set(self.format.choices) else self.format.choices

    def reference(self, example: Example) -> str:
        """The right answer of one row, in the form that `AnswerFormat.extract` gives.

        Raises:
            UserError: neither the field `answer` nor the worked answer holds one, or it is not among the row's
                choices.
        """
        text = example.reference if example.reference is not None else example.answer
        found = None if text is None else self.format.reference(text, is_worked=example.reference is None)
        choices = self.row_choices(example)
        if found is None or (choices and found not in choices):
            allowed = f"one of {', '.join(choices)}" if choices else "a number"
            raise UserError(
                f"{self.name}: {example.where} has no answer to compare with: its answer is {text!r}, and it must be "
                f'{allowed}. Mend its field "answer", or remove the row.'
            )
        return found


def _math(name: str, format: AnswerFormat | None = None) -> Task:
    # 300 new tokens as in the published protocol; the longest worked answers of the training data take about 270.
    return Task(name=name, suite="math", format=format or AnswerFormat(kind="number"), max_new_tokens=300)


def _commonsense(name: str, choices: Sequence[str]) -> Task:
    # 40 new tokens as in the published protocol; "the correct answer is solution1" takes 7.
    answers = AnswerFormat(kind="option", choices=tuple(choices))
    return Task(name=name, suite="commonsense", format=answers, max_new_tokens=40)


def _numbered(word: str, count: int) -> list[str]:
    return [f"{word}{number}" for number in range(1, count + 1)]


_ALL = (
    _math("AddSub"),
    _math("AQuA", AnswerFormat(kind="letter", choices=tuple("ABCDE"))),
    _math("gsm8k"),
    _math("MultiArith"),
    _math("SingleEq"),
    _math("SVAMP"),
    _math("mawps"),
    _commonsense("boolq", ["true", "false"]),
    _commonsense("piqa", _numbered("solution", 2)),
    _commonsense("social_i_qa", _numbered("answer", 3)),
    _commonsense("hellaswag", _numbered("ending", 4)),
    _commonsense("winogrande", _numbered("option", 2)),
    _commonsense("ARC-Easy", _numbered("answer", 5)),
    _commonsense("ARC-Challenge", _numbered("answer", 5)),
    _commonsense("openbookqa", _numbered("answer", 4)),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {suite: tuple(task.name for task in _ALL if task.suite == suite) for suite in ("math", "commonsense")}
)


def name_key(word: str) -> str:
    """What the spellings of a name have in common: letters and digits, in lower case."""
    return re.sub(r"[^a-z0-9]", "", word.lower())


# Other names in use, without punctuation and in lower case.
_ALIASES = {
    "gsm": "gsm8k",
    "aquarat": "AQuA",
    "siqa": "social_i_qa",
    "socialiqa": "social_i_qa",
    "wino": "winogrande",
    "winog": "winogrande",
    "arce": "ARC-Easy",
    "arcc": "ARC-Challenge",
    "obqa": "openbookqa",
    "openbook": "openbookqa",
}
_NAMES_BY_KEY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {key: (name,) for key, name in _ALIASES.items()} | {name_key(name): (name,) for name in TASKS} | dict(SUITES)
)


def select_tasks(words: Sequence[str]) -> list[Task]:
    """The tasks that names and suites stand for, in the order given, each once.

    Args:
        words: names of `TASKS`, of `SUITES`, or usual other names ("arc_e", "obqa"), in any letter case; dashes,
            underscores and blanks do not matter.

    Raises:
        UserError: a word stands for nothing, or there is none.
    """
    known = f"Suites: {', '.join(SUITES)}. Tasks: {', '.join(TASKS)}."
    if not words:
        raise UserError(f"tasks: none is given; name at least one task or suite. {known}")
    names: dict[str, None] = {}
    for word in words:
        key = name_key(word)
        if key not in _NAMES_BY_KEY:
            near = [name for match in get_close_matches(key, _NAMES_BY_KEY, n=3) for name in _shown(match)]
            hint = f"Did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
            raise UserError(f"tasks: there is no task or suite {word!r}. {hint}{known}")
        names.update(dict.fromkeys(_NAMES_BY_KEY[key]))
    return [TASKS[name] for name in names]


def find_task(word: str) -> Task | None:
    """The task of that name, in any of its spellings; None where there is none."""
    names = _NAMES_BY_KEY.get(name_key(word), ())
    return TASKS[names[0]] if len(names) == 1 else None


def _shown(key: str) -> tuple[str, ...]:
    """How messages write what a key stands for."""
    return (key,) if key in SUITES else _NAMES_BY_KEY[key]
