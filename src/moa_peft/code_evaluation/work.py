"""Code tasks from problems to scores, with programs that are kept and not asked for twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moa_peft.code_evaluation.problems import CodeProblem
from moa_peft.code_evaluation.sampling import SamplingSettings, check_problem_lengths, sample_completions
from moa_peft.code_evaluation.scoring import score_code

if TYPE_CHECKING:
    from moa_peft.evaluation.folder import EvaluationFolder

CODE_VERSION = 2
"""Raised whenever scores would move for equal programs."""


@dataclass(frozen=True, kw_only=True)
class CodeWork:
    """What is to be done.

    Attributes:
        problems: by task.
        settings: how they are answered.
        pass_at: for which k pass@k is estimated.
    """

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


def check_code_lengths(model: Any, tokenizer: Any, work: CodeWork) -> None:
    """Refuse problems of any task that are too long for the model, before the first is answered.

    Raises:
        UserError: one leaves the model no positions for a program of `max_new_tokens`.
    """
    for problems in work.problems.values():
        check_problem_lengths(model, tokenizer, problems, work.settings)


def score_code_tasks(
    model: Any,
    tokenizer: Any,
    work: CodeWork,
    *,
    folder: EvaluationFolder | None,
    batch_size: int,
    console: Any,
    after_task: Callable[[], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Answer the problems, run the answers, and record the scores; those of each task by its name.

    Call it only with the user's permission (`sandbox.require_permission`).

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        work: the problems and how they are answered.
        folder: an opened folder, whose programs are not asked for again; None to keep nothing.
        batch_size: programs written at a time.
        console: where progress goes.
        after_task: called when a task is scored and recorded.
    """
    results = {}
    for task, problems in work.problems.items():
        console.print(f"{task}: {len(problems):,} problems", highlight=False, markup=False)
        completions = sample_completions(
            model,
            tokenizer,
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
        if after_task is not None:
            after_task()
    return results
