"""The data of a study: fixed samples of training rows, and the question sets that every run is scored on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_peft.data import Example, load_examples
from moa_peft.errors import UserError
from moa_peft.evaluation.question_sets import QuestionSet, parts_by_twins
from moa_peft.evaluation.run import ScoringSettings, check_sets
from moa_peft.files import write_atomically
from moa_peft.study.spec import DataSpec
from moa_peft.tasks import load_task, select_tasks

SAMPLE_SEED = 0
"""Of the samples of rows: the same for all rows and seeds of a study."""


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """One data set, ready for training and scoring.

    Attributes:
        train_path: what a recipe's `data.path` says.
        train_examples: the rows there.
        is_sample: the rows are a sample, which `write_sample` puts there.
        sets: question sets of its tasks.
        settings: how they are scored.
        generated: names of the sets that `generate` is for.
        transfer: names of the sets of whose kind there are no training rows; they are reported apart.
    """

    train_path: str
    train_examples: Sequence[Example]
    is_sample: bool
    sets: Sequence[QuestionSet]
    settings: ScoringSettings
    generated: frozenset[str]
    transfer: frozenset[str]

    def scorings(self, questions: QuestionSet) -> tuple[str, ...]:
        """How a set is scored."""
        kinds = self.settings.scorings
        return kinds if questions.name in self.generated else tuple(kind for kind in kinds if kind != "generate")


def prepare_data(spec: DataSpec, *, roots: Sequence[Path], file: Path, template: Any) -> StudyData:
    """Load a data set and draw its samples.

    Args:
        spec: what the study says.
        roots: folders that `train` and `test` are looked for in.
        file: where sampled training rows are going to be.
        template: how prompts are written.

    Raises:
        UserError: a file is missing or damaged, or a set cannot be scored as asked.
    """
    examples = load_examples(_located(roots, spec.train), split="train")
    train_path = _located(roots, spec.train)
    if spec.train_rows is not None:
        examples = _sample(examples, spec.train_rows, "train_rows")
        train_path = str(file)
    sets = []
    for task in select_tasks(spec.tasks):
        questions = load_task(task, _located(roots, spec.test), limit=None)
        if spec.test_rows is not None:
            questions = _sample(questions, min(spec.test_rows, len(questions)), "test_rows")
        parts = parts_by_twins(questions, examples) if task.format.kind == "number" else {}
        sets.append(QuestionSet(name=task.name, task=task, examples=questions, source=spec.test, parts=parts))
    settings = ScoringSettings(
        scorings=spec.scorings,
        template=template,
        max_new_tokens=spec.max_new_tokens,
        batch_size=spec.batch_size,
    )
    check_sets(sets, settings)
    for key in ("transfer", "generate_tasks"):
        named = getattr(spec, key) or ()
        others = [task.name for task in select_tasks(named)] if named else []
        unknown = [name for name in others if name not in {questions.name for questions in sets}]
        if unknown:
            raise UserError(f"study: {key} names {unknown[0]!r}, which is not among the tasks. Add it there too.")
    chosen = select_tasks(spec.tasks if spec.generate_tasks is None else spec.generate_tasks)
    generated = frozenset(task.name for task in chosen)
    unscored = [questions.name for questions in sets if questions.name not in generated]
    if unscored and set(spec.scorings) == {"generate"}:
        raise UserError(
            f"study: generate_tasks leaves {unscored[0]!r} out, and generate is the only way of scoring. Leave the "
            "task out too, or add nll or loglikelihood to scorings."
        )
    return StudyData(
        train_path=train_path,
        train_examples=examples,
        is_sample=spec.train_rows is not None,
        sets=sets,
        settings=settings,
        generated=generated,
        transfer=frozenset(task.name for task in select_tasks(spec.transfer)) if spec.transfer else frozenset(),
    )


def write_sample(data: StudyData) -> None:
    """Write the sampled training rows as JSON Lines, unless they are there."""
    if not data.is_sample:
        return
    file = Path(data.train_path)
    text = "".join(json.dumps(_row(example), ensure_ascii=False) + "\n" for example in data.train_examples)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)


def _located(roots: Sequence[Path], name: str) -> str:
    """The file or folder below a root; a name that is in none is left to the loader, as a path or hub id."""
    return next((str(root / name) for root in roots if (root / name).exists()), name)


def _sample(examples: Sequence[Example], size: int, name: str) -> list[Example]:
    """A fixed random sample, in the order of the rows."""
    if size > len(examples):
        raise UserError(
            f"study: {name} {size} is more than the {len(examples)} rows there are. Give fewer, or leave it out."
        )
    chosen = random.Random(SAMPLE_SEED).sample(range(len(examples)), size)
    return [examples[index] for index in sorted(chosen)]


def _row(example: Example) -> dict[str, Any]:
    reference = {} if example.reference is None else {"answer": example.reference}
    if example.source is not None:
        return {**example.source, "output": example.answer, **reference}
    messages = [{"role": message.role, "content": message.content} for message in example.messages]
    return {"messages": messages, **reference}
