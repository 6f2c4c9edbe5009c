"""Examples from a local file, a folder or a data set on the hub."""

import json
import logging
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from moa_peft.data.examples import Example
from moa_peft.data.formats import parse_row
from moa_peft.data.optional import import_from_train_extra
from moa_peft.errors import UserError

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".parquet")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?::[\w.-]+)?")
_SPLIT_OF_NAME_PART = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
}


def load_examples(
    path: str | Path, *, split: str = "train", limit: int | None = None, require_answer: bool = True
) -> list[Example]:
    """Load the rows of a data set as examples.

    A file is read whole, whatever its name says. Of a folder, the files whose name states the split are read
    (`train.json`, `boolq.train.jsonl`, `train-00000-of-00002.parquet`); where no name states it and `split` is
    "train", all data files that state no other split. Sub-folders are not searched. A path that does not exist
    locally and looks like `org/name` or `org/name:config` is loaded from the hub with `datasets`.

    Args:
        path: a .json file (an array, or {"data": [...]}), a .jsonl or .parquet file, a folder, or a hub id.
        split: which split of a folder or hub data set to load.
        limit: at most this many rows, from the start; rows after them are not checked.
        require_answer: whether every row must have the field with the answer (its text may be empty).

    Returns:
        The examples in the order of the rows; files of a folder in the order of their names.

    Raises:
        UserError: nothing is there, a file cannot be decoded, a row has the wrong fields, or the forms are mixed.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UserError(f"limit={limit!r} must be a positive whole number, or not set for all rows.")
    if not str(path).strip():
        raise UserError("The path of the data is empty; give a file, a folder or a hub id such as org/name.")
    local = Path(path).expanduser()
    if local.is_dir():
        rows = _folder_rows(local, split)
    elif local.exists():
        rows = file_rows(local)
    elif isinstance(path, str) and is_hub_id(path):
        rows = hub_rows(path, split)
    else:
        raise UserError(
            f"There is no file or folder {path} (looked in {Path.cwd()}). Give a {', '.join(SUFFIXES)} file, a folder "
            f"of such files, or a hub id of the form org/name or org/name:config."
        )
    examples: list[Example] = []
    form: str | None = None
    for row, where, row_split in islice(rows, limit):
        example, form = parse_row(row, where=where, split=row_split, require_answer=require_answer, form=form)
        examples.append(example)
    if not examples:
        raise UserError(f"{path} has no rows; give a data set with at least one.")
    return examples


Row = tuple[Any, str, str | None]  # the row, where it stands, the split its file or hub call states


def _folder_rows(folder: Path, split: str) -> Iterator[Row]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError(
            f"The folder {folder} has no {', '.join(SUFFIXES)} file, and sub-folders are not searched; name a file or "
            f"another folder."
        )
    wanted = _SPLIT_OF_NAME_PART.get(split, split)
    chosen = [file for file in files if _split_of(file) == wanted or file.stem == split]
    if not chosen and wanted == "train":
        chosen = [file for file in files if _split_of(file) is None]
    if not chosen:
        names = ", ".join(file.name for file in files[:10]) + (", ..." if len(files) > 10 else "")
        raise UserError(
            f"The folder {folder} has no file for split={split}; its data files are {names}. Name a file of it "
            f"directly, or give a file a name such as {split}.json."
        )
    logger.info("Split %s of %s: %s", split, folder, ", ".join(file.name for file in chosen))
    for file in chosen:
        yield from file_rows(file)


def _split_of(file: Path) -> str | None:
    for part in re.split(r"[^a-z]+", file.stem.lower()):
        if part in _SPLIT_OF_NAME_PART:
            return _SPLIT_OF_NAME_PART[part]
    return None


def file_rows(file: Path) -> Iterator[Row]:
    """The rows of a .json, .jsonl or .parquet file, each with its place for messages and the split of the name.

    Raises:
        UserError: the file is of another kind, empty, or cannot be read or decoded.
    """
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file} is of an unknown kind; allowed are files that end in {', '.join(SUFFIXES)}.")
    split = _split_of(file)
    try:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty (0 bytes); give a file with at least one row.")
        for row, place in reader(file):
            yield row, f"{file.name} {place}", split
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error


def _json_rows(file: Path) -> Iterator[tuple[Any, str]]:
    text = file.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise UserError(f"{file} is empty; give a file with at least one row.")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " One object a line is JSON Lines: rename the file to end in .jsonl." if _is_json_lines(error) else ""
        raise UserError(
            f"{file} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}.") from error
    rows = content["data"] if isinstance(content, dict) and "data" in content else content
    if not isinstance(rows, list):
        found = f"an object with the keys {', '.join(content)}" if isinstance(content, dict) else "a single value"
        raise UserError(f'{file} must hold an array of rows, or {{"data": [rows]}}; found {found}.')
    yield from ((row, f"row {number}") for number, row in enumerate(rows, start=1))


def _is_json_lines(error: json.JSONDecodeError) -> bool:
    return error.msg == "Extra data" and error.doc[: error.pos].rstrip().endswith("}")


def _jsonl_rows(file: Path) -> Iterator[tuple[Any, str]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line), f"line {number}"
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{file} is not valid JSON Lines: line {number}, column {error.colno}: {error.msg}. Each line "
                    f"must be one complete JSON object."
                ) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file} cannot be read as JSON in line {number}: {error}.") from error


def _parquet_rows(file: Path) -> Iterator[tuple[Any, str]]:
    pyarrow = import_from_train_extra("pyarrow")
    parquet = import_from_train_extra("pyarrow.parquet")
    try:
        with parquet.ParquetFile(file) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches())
            rows = (row for batch in batches for row in batch)
            yield from ((row, f"row {number}") for number, row in enumerate(rows, start=1))
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is not a readable Parquet file: {error}. Write it again or give another.") from error


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form org/name or org/name:config and is no name of a data file."""
    return _HUB_ID.fullmatch(path) is not None and not path.endswith(SUFFIXES)


def hub_rows(path: str, split: str) -> Iterator[Row]:
    """The rows of a data set on the hub, each with its place for messages and its split.

    Raises:
        UserError: `datasets` is not installed, or the data set cannot be had.
    """
    datasets = import_from_train_extra("datasets")
    name, _, config = path.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    # The call reaches the network, the cache, file builders and parsers, whose errors share no base class; all of
    # them mean that this data set cannot be had under this name.
    except Exception as error:
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise UserError(
            f"{path}, split={split}, could not be loaded: there is no local file or folder of that name, and the hub "
            f"gave: {reason}. {_hub_advice()}"
        ) from error
    place = f"{path} {split}"
    stated = _SPLIT_OF_NAME_PART.get(split.partition("[")[0], split)
    yield from ((row, f"{place} row {number}", stated) for number, row in enumerate(rows, start=1))


def _hub_advice() -> str:
    hub = import_from_train_extra("huggingface_hub")
    if hub.is_offline_mode():
        return (
            "Offline mode is on (HF_HUB_OFFLINE), so only data sets already in the cache can be loaded: unset it, or "
            "download the data elsewhere and give the file."
        )
    return (
        "Check the spelling (org/name or org/name:config), the split, the network and, for a private data set, "
        "`hf auth login`; or give a local file."
    )
