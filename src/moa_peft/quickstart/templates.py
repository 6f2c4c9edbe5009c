"""What a word-problem template is, and how one is filled in.

A template is data: the texts of question and worked answer, the ranges of its numbers, and the calculation as
steps such as "a * b". A step's text and its result come from the same expression, so they cannot disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from string import Formatter

from moa_peft.quickstart.vocabulary import NAMES, NOUNS, PRONOUNS, plural

Range = tuple[int, int] | tuple[int, int, int]
RESULT_NAMES = ("x", "y", "z")


@dataclass(frozen=True)
class Template:
    """One story with one way to solve it.

    In the texts, `{a}` is a number, `{a:item}` a number with its noun in singular or plural (a slot of the
    vocabulary, or a plain English noun), `{item}` and `{items}` the noun alone, `{s1}` the first step as
    "16 - 12 = 4" (`{s1:item}` with the noun after it), `{name}`, `{pal}`, `{he}`, `{him}`, `{his}` the people.

    Attributes:
        key: Unique name.
        operation: The kind of calculation.
        question: The text of the problem.
        solution: The worked answer without its last sentence.
        steps: Expressions over the numbers; their results are called x, y and z. The last result is the answer.
        free: Inclusive range (low, high) or (low, high, step) of each number that is drawn.
        given: Numbers computed from the drawn ones, in order, so that for example a division leaves no rest.
    """

    key: str
    operation: str
    question: str
    solution: str
    steps: tuple[str, ...]
    free: Mapping[str, Range]
    given: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def operand_names(self) -> tuple[str, ...]:
        """The numbers that the question states, in the order of their first mention."""
        fields = [name for _, name, _, _ in Formatter().parse(self.question) if name is not None]
        return tuple(dict.fromkeys(name for name in fields if name in self.free or name in self.given))


@dataclass(frozen=True)
class Filled:
    """A template with everything drawn: the texts, the stated numbers and the result."""

    question: str
    output: str
    operands: tuple[int, ...]
    answer: int


def evaluate(expression: str, values: Mapping[str, int]) -> int:
    """Compute an expression of names, integers and + - * / separated by spaces, from left to right.

    Raises:
        ValueError: A division leaves a rest, or an unknown operator.
    """
    tokens = expression.split()
    total = _operand(tokens[0], values)
    for operator, token in zip(tokens[1::2], tokens[2::2], strict=True):
        operand = _operand(token, values)
        if operator == "+":
            total += operand
        elif operator == "-":
            total -= operand
        elif operator == "*":
            total *= operand
        elif operator == "/" and total % operand == 0:
            total //= operand
        else:
            raise ValueError(f"cannot compute {total} {operator} {operand} in {expression!r}")
    return total


def draw_numbers(template: Template, random: Random) -> dict[str, int]:
    """Draw the free numbers of a template and compute the given ones."""
    values: dict[str, int] = {}
    for name, bounds in template.free.items():
        choices = range(bounds[0], bounds[1] + 1, bounds[2] if len(bounds) == 3 else 1)
        values[name] = choices[_index(random, len(choices))]
    for name, expression in template.given.items():
        values[name] = evaluate(expression, values)
    return values


def fill(template: Template, values: Mapping[str, int], random: Random) -> Filled:
    """Draw people and things, and write question and worked answer with the drawn numbers."""
    people, nouns = _draw_words(random)
    fields: dict[str, object] = {name: _Number(value, nouns) for name, value in values.items()}
    fields.update(people)
    for slot, noun in nouns.items():
        fields[slot] = noun
        fields[slot + "s"] = plural(noun)
    known = dict(values)
    result = 0
    for number, (name, expression) in enumerate(zip(RESULT_NAMES, template.steps), start=1):
        result = evaluate(expression, known)
        shown = " ".join(str(known.get(token, token)) for token in expression.split())
        known[name] = result
        fields[name] = _Number(result, nouns)
        fields[f"s{number}"] = _Number(result, nouns, shown=f"{shown} = {result}")
    return Filled(
        question=template.question.format_map(fields),
        output=f"{template.solution.format_map(fields)} The answer is {result}.",
        operands=tuple(values[name] for name in template.operand_names),
        answer=result,
    )


def _operand(token: str, values: Mapping[str, int]) -> int:
    return values[token] if token in values else int(token)


class _Number:
    """A number (or the step that gives it) that adds a noun in the right form when formatted with one."""

    def __init__(self, value: int, nouns: Mapping[str, str], *, shown: str | None = None):
        self._value = value
        self._nouns = nouns
        self._shown = str(value) if shown is None else shown

    def __format__(self, spec: str) -> str:
        if not spec:
            return self._shown
        noun = self._nouns.get(spec, spec)
        return f"{self._shown} {noun if self._value == 1 else plural(noun)}"


def _draw_words(random: Random) -> tuple[dict[str, str], dict[str, str]]:
    name = NAMES[_index(random, len(NAMES))]
    others = [other for other, _ in NAMES if other != name[0]]
    pal = others[_index(random, len(others))]
    subject, object_, possessive = PRONOUNS[name[1]]
    people = {"name": name[0], "pal": pal, "he": subject, "him": object_, "his": possessive}
    people |= {"He": subject.capitalize(), "His": possessive.capitalize()}
    nouns = {slot: pool[_index(random, len(pool))] for slot, pool in NOUNS.items()}
    return people, nouns


def _index(random: Random, length: int) -> int:
    # Only `random()` promises the same sequence in every Python version; `choice` and `randint` do not.
    return int(random.random() * length)
