"""What kind of answer a question set has, and how answers of that kind are read, compared and written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, get_args

from moa_peft.answers.legacy import legacy_letter, legacy_number, legacy_option
from moa_peft.answers.letters import extract_letter
from moa_peft.answers.numbers import extract_number, numbers_match, only_number
from moa_peft.answers.options import extract_option
from moa_peft.errors import UserError

AnswerKind = Literal["number", "letter", "option"]
AnswerMode = Literal["strict", "flexible", "legacy"]

# Beyond this the digits of a float say nothing, and an exponent is the shorter text.
_LARGEST_PLAIN = 1e21


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """How the answers of a question set look.

    Attributes:
        kind: a number, the letter of a choice, or the label of an option.
        choices: the letters or labels in their order; empty for numbers.
    """

    kind: AnswerKind
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(AnswerKind):
            raise UserError(f"kind is {self.kind!r}; allowed are {', '.join(get_args(AnswerKind))}.")
        if (self.kind == "number") == bool(self.choices):
            raise UserError(
                f"choices is {self.choices!r} for kind={self.kind!r}; give the labels for letters and options, and "
                "none for numbers."
            )

    def extract(self, text: str, *, mode: AnswerMode) -> str | None:
        """The answer that a text gives, in one form for equal answers: "27", "-0.5", "C", "answer3".

        Args:
            text: what the model wrote.
            mode: `strict` reads the first statement of an answer, `flexible` falls back on the last number, letter or
                label, `legacy` reads as published numbers were read (`moa_peft.answers.legacy`).

        Returns:
            The answer; None where there is none, which is a miss.

        Raises:
            UserError: `mode` is none of the three; or the answer is in LaTeX and math-verify is not installed.
        """
        if mode not in get_args(AnswerMode):
            raise UserError(f"mode is {mode!r}; allowed are {', '.join(get_args(AnswerMode))}.")
        if self.kind == "number":
            number = legacy_number(text) if mode == "legacy" else extract_number(text, mode=mode)
            return None if number is None else number_text(number)
        if mode == "legacy":
            extract = legacy_letter if self.kind == "letter" else legacy_option
            return extract(text, choices=self.choices)
        extract = extract_letter if self.kind == "letter" else extract_option
        return extract(text, choices=self.choices, mode=mode)

    def is_settled(self, text: str) -> bool:
        """Whether a text states its answer so that nothing it says later is read instead, but for a correction."""
        if self.kind == "number":
            return extract_number(text, mode="settled") is not None
        extract = extract_letter if self.kind == "letter" else extract_option
        return extract(text, choices=self.choices, mode="settled") is not None

    def matches(self, answer: str | None, reference: str) -> bool:
        """Whether an extracted answer is the right one: numbers within 1e-3, letters and labels equal.

        Args:
            answer: what `extract` returned; None never matches.
            reference: what `reference` returned.
        """
        if answer is None or self.kind != "number":
            return answer == reference
        return numbers_match(float(answer), float(reference))

    def reference(self, text: str, *, is_worked: bool = False) -> str | None:
        """The right answer in the form of `extract`; None for none, or for a text that could mean several numbers.

        Args:
            text: a row's `answer` field, or its worked answer.
            is_worked: whether it is a worked answer, which may hold other numbers as well.
        """
        for choice in self.choices:
            if text.strip().casefold() == choice.casefold():
                return choice
        if self.kind == "number" and not is_worked:
            number = only_number(text)
            return None if number is None else number_text(number)
        return self.extract(text, mode="flexible")

    def statement(self, choice: str) -> str:
        """The sentence with which a model trained on these sets states `choice`."""
        if self.kind == "option":
            return f"the correct answer is {choice}"
        return f"The answer is ({choice})." if self.kind == "letter" else f"The answer is {choice}."


def number_text(number: float) -> str:
    """The shortest text of a number: "27" for 27.0, "0.5", "0.00001", with an exponent from 1e21 on only."""
    if number == 0:
        return "0"
    if not math.isfinite(number) or abs(number) >= _LARGEST_PLAIN:
        return repr(number)
    return str(int(number)) if number == int(number) else format(Decimal(repr(number)), "f")
