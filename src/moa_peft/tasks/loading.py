"""The test rows of a task, from a folder in any of the usual layouts or from the hub."""

from __future__ import annotations

import re
from pathlib import Path

from moa_peft.data import Example, load_examples
from moa_peft.data.loading import SUFFIXES
from moa_peft.errors import UserError
from moa_peft.tasks.base import Task

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def load_task(task: Task, data: str, *, limit: int | None = None) -> list[Example]:
    """Load the test rows of a task.

    A folder is searched for NAME.test.json, NAME.json, SUITE/NAME.test.json, SUITE/NAME.json, NAME/test.json and
    SUITE/NAME/test.json (NAME/test.json is LLM-Adapters' own layout), each also as .jsonl and .parquet; letter case
    does not matter. Files of training data never match.

    Args:
        task: which question set.
        data: a folder, or a data set on the hub (ORG/NAME) whose configurations are named like the tasks.
        limit: at most this many rows, from the start.

    Returns:
        The rows in their order. Every one has a reference that `Task.reference` reads.

    Raises:
        UserError: there is no such folder or file, it cannot be read, or a row has no right answer.
    """
    folder = Path(data).expanduser()
    if folder.is_dir():
        path = str(_find(task, folder))
    elif _HUB_ID.fullmatch(data) and not folder.exists():
        path = f"{data}:{task.name}"
    else:
        kind = "is a file" if folder.is_file() else "does not exist"
        raise UserError(
            f"data: {data!r} {kind}. Give a folder with files such as {task.name}.json, or a data set on the hub "
            "(ORG/NAME) with a configuration for every task."
        )
    examples = load_examples(path, split="test", limit=limit, require_answer=False)
    for example in examples:
        task.reference(example)
    return examples


def _find(task: Task, folder: Path) -> Path:
    places = _places(task)
    for place in places:
        found = _resolve(folder, place.split("/"))
        if found is not None:
            return found
    looked = ", ".join(place for place in places if place.endswith(SUFFIXES[0]))
    raise UserError(
        f"data: there are no test rows of {task.name} in {str(folder)!r}. Looked for {looked}, and for the same with "
        f"{' and '.join(SUFFIXES[1:])}. Add the file, or leave {task.name} out of the tasks."
    )


def _places(task: Task) -> list[str]:
    """Where the rows may stand below the folder, the most explicit first."""
    name, suite = task.name, task.suite
    stems = [f"{name}.test", name, f"{suite}/{name}.test", f"{suite}/{name}", f"{name}/test", f"{suite}/{name}/test"]
    return [stem + suffix for stem in stems for suffix in SUFFIXES]


def _resolve(folder: Path, parts: list[str]) -> Path | None:
    """The file that `parts` lead to, in any letter case; an exact name before others."""
    wanted = parts[0].casefold()
    entries = sorted(folder.iterdir(), key=lambda entry: (entry.name != parts[0], entry.name))
    for entry in entries:
        if entry.name.casefold() != wanted:
            continue
        if len(parts) == 1 and entry.is_file():
            return entry
        found = _resolve(entry, parts[1:]) if len(parts) > 1 and entry.is_dir() else None
        if found is not None:
            return found
    return None
