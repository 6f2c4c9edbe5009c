"""The right answers of a set, and the texts whose likelihood is measured."""

from __future__ import annotations

from collections.abc import Sequence

from moa_peft.answers import AnswerFormat
from moa_peft.data import Example
from moa_peft.errors import UserError


def reference_answers(examples: Sequence[Example], format: AnswerFormat) -> list[str]:
    """The right answer of every question: its `reference`, else what its answer states.

    Raises:
        UserError: there is no question, or one without a right answer.
    """
    if not examples:
        raise UserError("data: there are no questions to score; give a file with at least one row.")
    references = []
    for example in examples:
        text = example.reference if example.reference is not None else example.answer
        answer = None if text is None else format.reference(text, is_worked=example.reference is None)
        if answer is None:
            what = "number" if format.kind == "number" else f"answer among {', '.join(format.choices)}"
            raise UserError(
                f"data: {example.where} has no {what} to compare with (its answer is {text!r}).\n"
                'Give every row a field "answer" with the right one.'
            )
        references.append(answer)
    return references


def agreeing_rows(examples: Sequence[Example], format: AnswerFormat) -> list[int]:
    """Positions of the rows whose written-out answer ends with the right one.

    The worked answers of the LLM-Adapters test files were written by a model and are often wrong: a likelihood of
    such a text would measure agreement with its mistakes. Rows without a worked answer are left out too.
    """
    references = reference_answers(examples, format)
    return [
        index
        for index, (example, reference) in enumerate(zip(examples, references, strict=True))
        if example.answer is not None and format.matches(format.extract(example.answer, mode="flexible"), reference)
    ]
