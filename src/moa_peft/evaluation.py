"""Scoring of question sets whose answers are numbers: greedy generation, extraction, accuracy with an interval.

Two accuracies stand side by side. The strict one counts a number only where the text states it ("the answer is 12"),
the flexible one falls back on the last number of the text; their distance says how much of a score is format.

A base model often runs on after its answer, with further questions of its own making. Its text is cut where the
answer is over (`cut_answer`), which depends on the text alone, and generation ends once that holds for every row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moa_peft.answers import extract_number, numbers_match
from moa_peft.data import Example, Template, end_token_ids, render_prompt
from moa_peft.errors import UserError
from moa_peft.generation import check_prompts, generate_texts
from moa_peft.intervals import Interval, wilson_interval

# A Markdown heading of the third level begins the next section of the Alpaca layout; GSM8K's "#### 12" is none.
_NEXT_SECTION = re.compile(r"(?:^|\n)### ")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One question with what the model made of it.

    Attributes:
        question: the user's text.
        reference: the right number.
        output: the generated text, cut where the answer is over.
        strict: the number the text states, None where it states none.
        flexible: that number, else the last one of the text.
        correct_strict: whether `strict` is right.
        correct_flexible: whether `flexible` is right.
    """

    question: str
    reference: float
    output: str
    strict: float | None
    flexible: float | None
    correct_strict: bool
    correct_flexible: bool

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for a line of JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Score:
    """The predictions of one question set, in the order of its rows, and the counts over them."""

    predictions: tuple[Prediction, ...]

    @property
    def num_items(self) -> int:
        """Number of questions."""
        return len(self.predictions)

    @cached_property
    def correct_strict(self) -> int:
        """Questions with the right number stated."""
        return sum(prediction.correct_strict for prediction in self.predictions)

    @cached_property
    def correct_flexible(self) -> int:
        """Questions with the right number stated or, without a statement, standing last."""
        return sum(prediction.correct_flexible for prediction in self.predictions)

    @cached_property
    def missing_strict(self) -> int:
        """Questions without a stated number; they count as wrong."""
        return sum(prediction.strict is None for prediction in self.predictions)

    @cached_property
    def missing_flexible(self) -> int:
        """Questions without any number; they count as wrong."""
        return sum(prediction.flexible is None for prediction in self.predictions)

    @property
    def accuracy_strict(self) -> float:
        """Share of the questions with the right number stated."""
        return self.correct_strict / self.num_items

    @property
    def accuracy_flexible(self) -> float:
        """Share of the questions that are right by the flexible extraction."""
        return self.correct_flexible / self.num_items

    @property
    def interval_strict(self) -> Interval:
        """95 % Wilson interval of `accuracy_strict`."""
        return wilson_interval(self.correct_strict, self.num_items)

    @property
    def interval_flexible(self) -> Interval:
        """95 % Wilson interval of `accuracy_flexible`."""
        return wilson_interval(self.correct_flexible, self.num_items)

    def to_dict(self) -> dict[str, Any]:
        """Counts, shares and intervals, without the predictions."""
        return {
            "num_items": self.num_items,
            "strict": {
                "correct": self.correct_strict,
                "missing": self.missing_strict,
                "accuracy": self.accuracy_strict,
                "interval_95": asdict(self.interval_strict),
            },
            "flexible": {
                "correct": self.correct_flexible,
                "missing": self.missing_flexible,
                "accuracy": self.accuracy_flexible,
                "interval_95": asdict(self.interval_flexible),
            },
        }


def score_numeric(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    template: Template,
    max_new_tokens: int = 200,
    batch_size: int = 32,
    console: Console | None = None,
) -> Score:
    """Answer every question greedily and compare the numbers.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        examples: questions with a numeric `reference`; rows without one use the number their answer states.
        template: how a prompt is written.
        max_new_tokens: upper limit of an answer; what is not stated by then is missing.
        batch_size: questions at a time, of similar length.
        console: where a progress bar is shown; None for none.

    Raises:
        UserError: there is no question, one has no number to compare with or is too long, or a setting is out of its
            range.
    """
    references = numeric_references(examples)
    prompts = [render_prompt(example, tokenizer, template=template) for example in examples]
    texts = generate_texts(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        end_ids=end_token_ids(tokenizer, template=template),
        # No continuation changes what `cut_answer` returns once it has cut something off.
        is_over=lambda text: cut_answer(text) != text,
        names=[example.where for example in examples],
        console=console,
    )
    rows = zip(examples, references, texts, strict=True)
    return Score(tuple(predict(example.question, reference, text) for example, reference, text in rows))


def check_lengths(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    template: Template,
    max_new_tokens: int,
) -> None:
    """Refuse questions that are too long for the model, before hours are spent on others; see `check_prompts`."""
    prompts = [render_prompt(example, tokenizer, template=template) for example in examples]
    check_prompts(model, prompts, names=[example.where for example in examples], max_new_tokens=max_new_tokens)


def predict(question: str, reference: float, text: str) -> Prediction:
    """Read the answer out of a generated text and compare it with the right number."""
    output = cut_answer(text)
    strict = extract_number(output, mode="strict")
    flexible = extract_number(output, mode="flexible")
    return Prediction(
        question=question,
        reference=reference,
        output=output,
        strict=strict,
        flexible=flexible,
        correct_strict=numbers_match(strict, reference),
        correct_flexible=numbers_match(flexible, reference),
    )


def cut_answer(text: str) -> str:
    """The text up to where its answer is over: the first line that ends with a number stated, or the next heading.

    Blank lines alone end nothing: worked answers have them between their steps.
    """
    heading = _NEXT_SECTION.search(text)
    text = text[: heading.start()] if heading else text
    for newline in re.finditer(r"\n", text):
        if extract_number(text[: newline.end()], mode="strict") is not None:
            return text[: newline.start()]
    return text


def numeric_references(examples: Sequence[Example]) -> list[float]:
    """The right number of every question: its `reference`, else what its answer states.

    Raises:
        UserError: there is no question, or one without a number.
    """
    if not examples:
        raise UserError("data: there are no questions to score; give a file with at least one row.")
    references = []
    for example in examples:
        text = example.reference if example.reference is not None else example.answer
        number = None if text is None else extract_number(text, mode="flexible")
        if number is None:
            raise UserError(
                f"data: {example.where} has no number to compare with (its answer is {text!r}).\n"
                'Give every row a field "answer" with the right number.'
            )
        references.append(number)
    return references
