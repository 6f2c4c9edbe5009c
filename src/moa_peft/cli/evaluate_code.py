"""The part of `moa eval` that asks for programs and runs them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moa_peft.errors import UserError

if TYPE_CHECKING:
    from moa_peft.adapter_loading import LoadedAdapter
    from moa_peft.code_evaluation import CodeProblem
    from moa_peft.code_evaluation.sampling import SamplingSettings
    from moa_peft.evaluation.folder import EvaluationFolder

CODE_TASKS = ("humaneval", "mbpp")
CODE_SUITE = "code"
CODE_VERSION = 1
"""Raised whenever scores would move for equal programs."""
_TEMPERATURE = 0.7
_TOP_P = 0.95


@dataclass(frozen=True, kw_only=True)
class CodeWork:
    """What is to be done: problems by task, how they are answered, and for which k pass@k is estimated."""

    problems: dict[str, list[CodeProblem]]
    settings: SamplingSettings
    pass_at: tuple[int, ...]

    def about(self) -> dict[str, dict[str, Any]]:
        """By task what decides its programs, as `EvaluationFolder.open` takes it."""
        return {
            task: {
                "task": task,
                "version": CODE_VERSION,
                "digest": hashlib.sha256(repr(problems).encode()).hexdigest(),
                "rows": len(problems),
                "sampling": asdict(self.settings),
            }
            for task, problems in self.problems.items()
        }


def split_code_tasks(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of tasks apart: question sets, and code tasks in their usual spelling."""
    others = [name for name in names if name.lower() not in (*CODE_TASKS, CODE_SUITE)]
    asked = [name.lower() for name in names if name not in others]
    return others, [task for task in CODE_TASKS if task in asked or CODE_SUITE in asked]


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

    require_permission(execute_code)
    check_sandbox(timeout_s=TIMEOUT_S, memory_mib=MEMORY_MIB, allow_network=False)
    if not all(word.isdigit() and 1 <= int(word) <= samples for word in pass_at) or not pass_at:
        raise UserError(
            f"--pass-at: {','.join(pass_at)!r} is not allowed; give whole numbers from 1 to --samples ({samples})."
        )
    sampled = samples > 1 or temperature is not None
    settings = SamplingSettings(
        samples=samples,
        temperature=(temperature or _TEMPERATURE) if sampled else None,
        top_p=_TOP_P if sampled else None,
        template=template,
        **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
    )
    if len(data) != 1:
        raise UserError(f"--data: {', '.join(tasks)} need one folder, file or hub id; {len(data)} are given.")
    problems: dict[str, Any] = {task: load_problems(task, data[0], limit=limit) for task in tasks}  # type: ignore[arg-type]
    return CodeWork(problems=problems, settings=settings, pass_at=tuple(int(word) for word in pass_at))


def score_code_tasks(
    loaded: LoadedAdapter, work: CodeWork, *, folder: EvaluationFolder | None, batch_size: int, console: Any
) -> dict[str, dict[str, Any]]:
    """Answer the problems, run the answers, and record the scores; those of each task by its name."""
    from moa_peft.code_evaluation import score_code
    from moa_peft.code_evaluation.sampling import sample_completions

    results = {}
    for task, problems in work.problems.items():
        console.print(f"{task}: {len(problems):,} problems", highlight=False, markup=False)
        completions = sample_completions(
            loaded.model,
            loaded.tokenizer,
            problems,
            work.settings,
            batch_size=batch_size,
            file=None if folder is None else folder.completions(task),
            console=console,
        )
        workers = max(1, (os.cpu_count() or 1) // 2)
        score = score_code(problems, completions, k=work.pass_at, workers=workers, console=console)
        results[task] = score.to_dict()
        if folder is not None:
            folder.record(task, {"code": results[task]})
    return results
