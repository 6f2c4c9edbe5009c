"""From the words of a command to question sets: named tasks in a folder or on the hub, or single files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moa_peft.answers import AnswerFormat
from moa_peft.data import Example, load_examples
from moa_peft.data.loading import SUFFIXES
from moa_peft.errors import UserError
from moa_peft.evaluation.question_sets import QuestionSet, parts_by_twins
from moa_peft.tasks import Task, find_task, load_task, select_tasks


def select_sets(
    tasks: Sequence[str], data: Sequence[str], *, limit: int | None = None, train: str | None = None
) -> list[QuestionSet]:
    """Load the question sets to score.

    Args:
        tasks: names of tasks and suites, looked for in the one folder or hub id that `data` gives; empty: `data` gives
            files. A file that is named like a task (`AddSub.json`, `boolq.test.json`, `boolq/test.json`) is that
            task, any other is a set of questions whose answers are numbers.
        data: a folder or hub id, or files.
        limit: only the first questions of every set.
        train: training rows; questions that occur there with other numbers are reported apart.

    Raises:
        UserError: nothing is given, a file is missing or damaged, a question has no right answer, or two sets would
            have one name.
    """
    if not data:
        raise UserError("--data: give a folder of question sets (or set MOA_DATA), a hub id, or files of questions.")
    trained = load_examples(train, split="train") if train is not None else []
    if tasks:
        if len(data) > 1:
            raise UserError(f"--data: --tasks looks in one folder or hub id, but {len(data)} are given. Give one.")
        found = [(task.name, task, data[0]) for task in select_tasks(tasks)]
        loaded = [(name, task, source, load_task(task, source, limit=limit)) for name, task, source in found]
    else:
        loaded = [(name, task, file, _load_file(file, task, limit)) for name, task, file in _named_files(data)]
    if train is not None and not any(task.format.kind == "number" for _, task, _, _ in loaded):
        raise UserError(
            "--train: twins are looked for in sets whose answers are numbers, and none of these is one. Leave it out."
        )
    return [_question_set(name, task, source, examples, trained) for name, task, source, examples in loaded]


def _question_set(
    name: str, task: Task, source: str, examples: list[Example], trained: Sequence[Example]
) -> QuestionSet:
    parts = parts_by_twins(examples, trained) if trained and task.format.kind == "number" else {}
    return QuestionSet(name=name, task=task, examples=examples, source=source, parts=parts)


def _load_file(file: str, task: Task, limit: int | None) -> list[Example]:
    examples = load_examples(file, split="test", limit=limit, require_answer=False)
    for example in examples:
        task.reference(example)
    return examples


def _named_files(files: Sequence[str]) -> list[tuple[str, Task, str]]:
    """Every file with its task and a name of its own: the file's, with its folder where two are called the same."""
    for file in files:
        if Path(file).expanduser().is_dir():
            raise UserError(f"--data: {file!r} is a folder. Say with --tasks which of its question sets to score.")
        if not file.lower().endswith(SUFFIXES):
            raise UserError(f"--data: {file!r} is no {', '.join(SUFFIXES)} file. For a hub id give --tasks too.")
    stems = [_stem(Path(file)) for file in files]
    names = [
        stem if stems.count(stem) == 1 else f"{Path(file).absolute().parent.name}-{Path(file).stem}"
        for file, stem in zip(files, stems, strict=True)
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--data: two files would both be called {twice!r}. Rename one, or score them separately.")
    return [(name, _task_of(stem), file) for name, stem, file in zip(names, stems, files, strict=True)]


def _stem(file: Path) -> str:
    """What a file is named after: the folder of a `test.json`, as in LLM-Adapters' own layout, else the file."""
    return (file.stem.lower() == "test" and file.absolute().parent.name) or file.stem


def _task_of(stem: str) -> Task:
    """The task that a file is named after, else questions whose answers are numbers."""
    known = find_task(stem.lower().removesuffix(".test"))
    return known or Task(name=stem, suite="own", format=AnswerFormat(kind="number"), max_new_tokens=200)
