"""The bundled data set: word problems with worked answers, generated from templates and a seed.

The same seed gives the same rows on every machine and every Python version. Nothing of the test split can be learnt
by heart from the others: its templates are its own, and so are its numbers. Every tuple of operands, in sorted
order, belongs to one split by its SHA-256, whatever the template and the seed. Validation shares the templates of
training, with numbers of its own.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from moa_peft.errors import UserError
from moa_peft.files import write_atomically
from moa_peft.quickstart.templates import Template, draw_numbers, fill
from moa_peft.quickstart.templates_held_out import HELD_OUT_TEMPLATES
from moa_peft.quickstart.templates_multi_step import MULTI_STEP_TEMPLATES
from moa_peft.quickstart.templates_one_step import ONE_STEP_TEMPLATES
from moa_peft.quickstart.templates_varied import VARIED_TEMPLATES

Split = Literal["train", "validation", "test"]

TRAIN_TEMPLATES = ONE_STEP_TEMPLATES + MULTI_STEP_TEMPLATES + VARIED_TEMPLATES
TEST_TEMPLATES = HELD_OUT_TEMPLATES

_TEMPLATES: dict[Split, tuple[Template, ...]] = {
    "train": TRAIN_TEMPLATES,
    "validation": TRAIN_TEMPLATES,
    "test": TEST_TEMPLATES,
}
_NUM_BUCKETS = 100
_BUCKETS: dict[Split, range] = {"train": range(70), "validation": range(70, 80), "test": range(80, 100)}
# A template is given up for a call once this many draws in a row gave no new problem.
_MAX_DRAWS = 400


@dataclass(frozen=True)
class WordProblem:
    """One problem: the key of its template, the numbers its text states, the texts, and the answer."""

    template: str
    operands: tuple[int, ...]
    instruction: str
    output: str
    answer: int

    def as_row(self) -> dict[str, str]:
        """The problem as a row of an instruction data set: instruction, input (empty), output, answer."""
        return {"instruction": self.instruction, "input": "", "output": self.output, "answer": str(self.answer)}


def split_of_operands(operands: tuple[int, ...]) -> Split:
    """The one split in which these numbers may occur, in any order."""
    text = ",".join(str(operand) for operand in sorted(operands))
    bucket = int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:4], "big") % _NUM_BUCKETS
    return next(split for split, buckets in _BUCKETS.items() if bucket in buckets)


def generate_word_problems(
    split: Split, *, num_rows: int, seed: int = 0, templates: Sequence[Template] | None = None
) -> list[WordProblem]:
    """Generate problems of one split, every template equally often as far as its numbers reach.

    Args:
        split: `train`, `validation` or `test`.
        num_rows: How many; no question occurs twice.
        seed: Another seed draws other problems, never across the borders of the splits.
        templates: Use only these, with the numbers of the split; by default all of the split.

    Returns:
        The problems in random order of templates. With fewer rows asked, a prefix of the same list.

    Raises:
        UserError: An unknown split, a negative number of rows, or more rows than there are problems.
    """
    if split not in _TEMPLATES:
        raise UserError(f"split is {split!r}; allowed are {', '.join(map(repr, _TEMPLATES))}.")
    if num_rows < 0:
        raise UserError(f"num_rows is {num_rows}; it must be 0 or more.")
    problems: list[WordProblem] = []
    chosen = _TEMPLATES[split] if templates is None else templates
    for problem in _draw_problems(split, chosen, Random(f"{split}/{seed}")):
        if len(problems) == num_rows:
            return problems
        problems.append(problem)
    if len(problems) < num_rows:
        raise UserError(
            f"num_rows is {num_rows}, but the templates of the split {split!r} give only about {len(problems)} "
            "different problems. Ask for fewer."
        )
    return problems


def write_word_problems(
    folder: Path, *, seed: int = 0, num_train: int = 6000, num_validation: int = 300, num_test: int = 300
) -> dict[Split, Path]:
    """Write train.jsonl, validation.jsonl and test.jsonl, each one row per line as in `WordProblem.as_row`.

    Args:
        folder: Where to; made if it does not exist. Files of these names are replaced.
        seed: See `generate_word_problems`.
        num_train: Rows of the training split.
        num_validation: Rows of the validation split.
        num_test: Rows of the test split.

    Returns:
        The path of each split's file.

    Raises:
        UserError: As for `generate_word_problems`; nothing is written then.
    """
    sizes: dict[Split, int] = {"train": num_train, "validation": num_validation, "test": num_test}
    problems: dict[Split, list[WordProblem]] = {}
    for split, num_rows in sizes.items():
        problems[split] = generate_word_problems(split, num_rows=num_rows, seed=seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[Split, Path] = {}
    for split, rows in problems.items():
        paths[split] = folder / f"{split}.jsonl"
        write_rows(paths[split], rows)
    return paths


def write_rows(path: Path, problems: Iterable[WordProblem]) -> None:
    """Write problems to one file, a row per line as in `WordProblem.as_row`; its folder exists."""
    write_atomically(path, "".join(json.dumps(problem.as_row()) + "\n" for problem in problems))


def _draw_problems(split: Split, templates: Sequence[Template], random: Random) -> Iterator[WordProblem]:
    """Yield new problems, a shuffled round over the templates at a time, until no template has any left."""
    seen: set[str] = set()
    active = list(templates)
    while active:
        exhausted = []
        for template in sorted(active, key=lambda _: random.random()):
            problem = _draw_new(template, split, seen, random)
            if problem is None:
                exhausted.append(template)
                continue
            seen.add(problem.instruction)
            yield problem
        active = [template for template in active if template not in exhausted]


def _draw_new(template: Template, split: Split, seen: set[str], random: Random) -> WordProblem | None:
    for _ in range(_MAX_DRAWS):
        values = draw_numbers(template, random)
        operands = tuple(values[name] for name in template.operand_names)
        if split_of_operands(operands) != split:
            continue
        filled = fill(template, values, random)
        if filled.question not in seen:
            return WordProblem(template.key, filled.operands, filled.question, filled.output, filled.answer)
    return None
