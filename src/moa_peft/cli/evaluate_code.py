"""The options of `moa eval` that ask for programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moa_peft.errors import UserError

if TYPE_CHECKING:
    from moa_peft.code_evaluation.work import CodeWork

_SUITE = "code"
_TEMPERATURE = 0.7
_TOP_P = 0.95


def split_code_tasks(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of tasks apart: question sets, and code tasks in their usual spelling."""
    from moa_peft.code_evaluation.problems import CodeDataset
    from moa_peft.tasks.base import name_key

    tasks = get_args(CodeDataset)
    # "humaneval+" is another set.
    keys = {name: name_key(name) if re.fullmatch(r"[\w\s-]+", name) else name for name in names}
    asked = {key for key in keys.values() if key in (*tasks, _SUITE)}
    others = [name for name in names if keys[name] not in asked]
    return others, [task for task in tasks if task in asked or _SUITE in asked]


def plan_code(
    tasks: Sequence[str],
    data: Sequence[str],
    *,
    execute_code: bool,
    samples: int,
    temperature: float | None,
    pass_at: Sequence[str],
    template: Any,
    max_new_tokens: int | None,
    limit: int | None,
) -> CodeWork | None:
    """Check the options and load the problems; None without code tasks.

    Raises:
        UserError: no permission to run programs, no way to confine them, or a wrong option.
    """
    if not tasks:
        return None
    from moa_peft.code_evaluation import load_problems, require_permission
    from moa_peft.code_evaluation.sampling import SamplingSettings
    from moa_peft.code_evaluation.sandbox import MEMORY_MIB, TIMEOUT_S, check_sandbox
    from moa_peft.code_evaluation.work import CodeWork
    from moa_peft.data.loading import is_hub_id

    require_permission(execute_code)
    check_sandbox(timeout_s=TIMEOUT_S, memory_mib=MEMORY_MIB, allow_network=False)
    if not all(word.isdecimal() and 1 <= int(word) <= samples for word in pass_at) or not pass_at:
        raise UserError(
            f"--pass-at: {','.join(pass_at)!r} is not allowed; give whole numbers from 1 to --samples ({samples})."
        )
    sampled = samples > 1 or temperature is not None
    settings = SamplingSettings(
        samples=samples,
        temperature=(_TEMPERATURE if temperature is None else temperature) if sampled else None,
        top_p=_TOP_P if sampled else None,
        template=template,
        **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
    )
    if len(data) != 1:
        raise UserError(f"--data: {', '.join(tasks)} need one folder, file or hub id; {len(data)} are given.")
    if len(tasks) > 1 and (is_hub_id(data[0]) or Path(data[0]).is_file()):
        raise UserError(
            f"--data: {data[0]!r} is one data set, but {', '.join(tasks)} are several. Give a folder with all of "
            "them, or score one after the other (into the same --output)."
        )
    problems: dict[str, Any] = {task: load_problems(task, data[0], limit=limit) for task in tasks}  # type: ignore[arg-type]
    return CodeWork(problems=problems, settings=settings, pass_at=tuple(int(word) for word in pass_at))
