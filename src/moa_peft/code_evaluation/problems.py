"""The problems of HumanEval and MBPP, from files as their authors publish them or from the hub.

Sources: Chen et al. 2021, arXiv 2107.03374 (HumanEval: 164 functions to complete); Austin et al. 2021,
arXiv 2108.07732 (MBPP: 974 described functions, of which the task ids 11 to 510 are the test split).
"""

from __future__ import annotations

import builtins
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moa_peft.data.loading import SUFFIXES, Row, file_rows, hub_rows, is_hub_id
from moa_peft.errors import UserError

logger = logging.getLogger(__name__)

CodeDataset = Literal["humaneval", "mbpp"]
PromptForm = Literal["instruction", "continuation"]

_HUB_IDS: dict[CodeDataset, str] = {
    "humaneval": "openai/openai_humaneval",
    "mbpp": "google-research-datasets/mbpp",
}
# Paths below a folder, best first, in lower case.
_FILE_PATTERNS: dict[CodeDataset, tuple[str, ...]] = {
    "humaneval": (
        r"(.*/)?human[-_]?eval\.(jsonl|json|parquet)",
        r"(.*/)?(openai_)?human[-_]?eval/(.*/)?test[^/]*\.(jsonl|json|parquet)",
        r"test[^/]*\.(jsonl|json|parquet)",
        r"(.*/)?[^/]*human[-_]?eval[^/]*\.(jsonl|json|parquet)",
    ),
    "mbpp": (
        r"(.*/)?mbpp\.(jsonl|json|parquet)",
        r"(.*/)?full/test[^/]*\.(jsonl|json|parquet)",
        r"(.*/)?(sanitized[-_]mbpp|mbpp[-_]sanitized)\.(jsonl|json|parquet)",
        r"(.*/)?(sanitized|mbpp)/(.*/)?test[^/]*\.(jsonl|json|parquet)",
        r"test[^/]*\.(jsonl|json|parquet)",
        r"(.*/)?[^/]*mbpp[^/]*\.(jsonl|json|parquet)",
    ),
}
_HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
_MBPP_STOPS = ("[DONE]", "\nassert ", "\nprint(", "\nif __name__")
_MBPP_TEST_IDS = range(11, 511)
_MBPP_OTHER_SPLITS = (range(1, 11), range(511, 601), range(601, 975))
_MBPP_SHOWN_TESTS = 3
_CALL = re.compile(r"(?<![\w.])([A-Za-z_]\w*)\s*\(")
_BUILTIN_NAMES = frozenset(dir(builtins))


@dataclass(frozen=True, kw_only=True)
class CodeProblem:
    """A programming problem with tests.

    Attributes:
        task_id: its name in the data set.
        prompt: the start of a module to complete (HumanEval), or a description (MBPP).
        entry_point: the function that the tests call, or None where the tests do not tell.
        tests: source that raises unless the solution is right; it runs in the solution's module, after it.
        stop_strings: where a continuation ends; only for base models, since a whole answer may begin with such text.
        dataset: where the problem comes from.
        shown_tests: test statements that are part of what the model is told (MBPP).
    """

    task_id: str
    prompt: str
    entry_point: str | None
    tests: str
    stop_strings: tuple[str, ...]
    dataset: CodeDataset
    shown_tests: tuple[str, ...] = ()


def load_problems(name: CodeDataset, data: str, *, limit: int | None = None) -> list[CodeProblem]:
    """Load the problems of HumanEval or of MBPP's test split.

    A file that holds all splits of MBPP is reduced to the task ids 11 to 510. MBPP is tested with `test_list`; its
    `challenge_test_list` is not used, as in the publication.

    Args:
        name: "humaneval" or "mbpp".
        data: a .jsonl, .json or .parquet file; a folder that holds one under a usual name, also in sub-folders; or a
            hub id such as "openai/openai_humaneval" or "google-research-datasets/mbpp:sanitized".
        limit: at most this many problems, from the start.

    Returns:
        The problems in the order of the rows.

    Raises:
        UserError: nothing is there, a file cannot be decoded, a row has the wrong fields, or a task id occurs twice.
    """
    if name not in get_args(CodeDataset):
        raise UserError(f"name={name!r} is no code data set; allowed are {', '.join(get_args(CodeDataset))}.")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UserError(f"limit={limit!r} must be a positive whole number, or not set for all problems.")
    parse = _humaneval_problem if name == "humaneval" else _mbpp_problem
    problems: dict[str, CodeProblem] = {}
    for row, where, _ in _rows(name, data):
        if not isinstance(row, dict):
            raise UserError(f"{where}: a problem must be an object with fields, not {type(row).__name__}.")
        problem = parse(row, where)
        if problem.task_id in problems:
            raise UserError(f"{where}: task_id {problem.task_id!r} occurs twice; give each problem once.")
        problems[problem.task_id] = problem
    chosen = _test_split(list(problems.values())) if name == "mbpp" else list(problems.values())
    if not chosen:
        raise UserError(f"{data} has no problems; give the {name} data, for example the hub id {_HUB_IDS[name]}.")
    return chosen[:limit]


def prompt_text(problem: CodeProblem, *, form: PromptForm = "instruction") -> str:
    """What the model is asked.

    Args:
        problem: the problem.
        form: "instruction" for models that follow instructions (to be put into their template); "continuation" for
            base models: the start of the module, which they go on with until one of `problem.stop_strings`.

    Returns:
        The text.

    Raises:
        UserError: `form` is neither of the two.
    """
    if form not in get_args(PromptForm):
        raise UserError(f"form={form!r}; allowed are {', '.join(get_args(PromptForm))}.")
    shown = "\n".join(problem.shown_tests)
    if problem.dataset == "humaneval":
        if form == "continuation":
            return problem.prompt
        return (
            f"Complete this Python function. Answer with the whole function, its signature and the imports it needs "
            f"included, in one code block.\n\n```python\n{problem.prompt.rstrip()}\n```"
        )
    if form == "continuation":
        return f'"""\n{problem.prompt.strip()}\n{shown}\n"""\n'
    return f"{problem.prompt.strip()}\nAnswer with Python code in one code block. It must pass these tests:\n\n{shown}"


def _rows(name: CodeDataset, data: str) -> Iterable[Row]:
    if not str(data).strip():
        raise UserError(f"data is empty; give a file, a folder or a hub id such as {_HUB_IDS[name]}.")
    local = Path(data).expanduser()
    if local.is_dir():
        return file_rows(_file_in(local, name))
    if local.exists():
        return file_rows(local)
    if is_hub_id(str(data)):
        return hub_rows(str(data), "test")
    raise UserError(
        f"There is no file or folder {data} (looked in {Path.cwd()}). Give a {', '.join(SUFFIXES)} file, a folder "
        f"that holds one, or a hub id such as {_HUB_IDS[name]}."
    )


def _file_in(folder: Path, name: CodeDataset) -> Path:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    for pattern in _FILE_PATTERNS[name]:
        for file in files:
            if re.fullmatch(pattern, file.relative_to(folder).as_posix().lower()):
                logger.info("%s: reading %s", name, file)
                return file
    found = ", ".join(file.relative_to(folder).as_posix() for file in files[:10]) or "none"
    usual = "HumanEval.jsonl" if name == "humaneval" else "mbpp.jsonl or sanitized-mbpp.json"
    raise UserError(
        f"The folder {folder} has no file of {name} under a usual name, such as {usual} or test-*.parquet; its data "
        f"files: {found}. Name the file itself (a .gz file must be unpacked first)."
    )


def _humaneval_problem(row: dict[str, Any], where: str) -> CodeProblem:
    entry_point = _text(row, "entry_point", where)
    return CodeProblem(
        task_id=_text(row, "task_id", where),
        prompt=_text(row, "prompt", where),
        entry_point=entry_point,
        tests=f"{_text(row, 'test', where)}\n\ncheck({entry_point})\n",
        stop_strings=_HUMANEVAL_STOPS,
        dataset="humaneval",
    )


def _mbpp_problem(row: dict[str, Any], where: str) -> CodeProblem:
    task_id = row.get("task_id")
    if isinstance(task_id, bool) or not isinstance(task_id, int | str) or not str(task_id).strip():
        raise UserError(f"{where}: task_id is {task_id!r}; it must be a number or a text.")
    tests = _texts(row, "test_list", where)
    if not tests:
        raise UserError(f"{where}: test_list is empty or missing; it must hold at least one assert statement.")
    before = [*_texts(row, "test_imports", where), *_texts(row, "test_setup_code", where)]
    return CodeProblem(
        task_id=str(task_id),
        prompt=_text(row, "text" if "text" in row else "prompt", where),
        entry_point=_called_function(tests),
        tests="\n".join([*before, *tests]) + "\n",
        stop_strings=_MBPP_STOPS,
        dataset="mbpp",
        shown_tests=tests[:_MBPP_SHOWN_TESTS],
    )


def _called_function(tests: Iterable[str]) -> str | None:
    """The first name that is called in every test and is no builtin: `assert set(f(x)) == {1}` calls f."""
    called = [[name for name in _CALL.findall(test) if name not in _BUILTIN_NAMES] for test in tests]
    return next((name for name in called[0] if all(name in names for names in called)), None)


def _test_split(problems: list[CodeProblem]) -> list[CodeProblem]:
    numbers = {int(problem.task_id) for problem in problems if problem.task_id.isdecimal()}
    if not all(any(number in split for number in numbers) for split in _MBPP_OTHER_SPLITS):
        return problems
    chosen = [
        problem for problem in problems if not problem.task_id.isdecimal() or int(problem.task_id) in _MBPP_TEST_IDS
    ]
    logger.info("mbpp: %d of %d problems are the test split (task ids 11 to 510)", len(chosen), len(problems))
    return chosen


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        found = (
            f"is {value!r}" if field in row else f"is missing; the row has {', '.join(map(str, row)) or 'no fields'}"
        )
        raise UserError(f"{where}: the field {field} must be a text, and it {found}.")
    return value


def _texts(row: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    """A field that holds statements: a list of texts, one text, or nothing."""
    value = row.get(field)
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,) if value.strip() else ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where}: the field {field} must be a list of texts, and it is {value!r}.")
    return tuple(value)
