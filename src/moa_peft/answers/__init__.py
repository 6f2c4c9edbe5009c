"""Reading the answer out of what a model wrote: numbers, letters of choices, labels of options."""

from moa_peft.answers.formats import AnswerFormat, AnswerKind, AnswerMode
from moa_peft.answers.latex import require_math_verify
from moa_peft.answers.numbers import extract_number, numbers_match
from moa_peft.answers.statements import ExtractionMode

__all__ = [
    "AnswerFormat",
    "AnswerKind",
    "AnswerMode",
    "ExtractionMode",
    "extract_number",
    "numbers_match",
    "require_math_verify",
]
