"""Scoring samples of code problems: every sample is run in the sandbox, pass@k with an interval over the problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress

from moa_peft.code_evaluation.completion import solution_code
from moa_peft.code_evaluation.pass_at_k import mean_pass_at_k, pass_at_k
from moa_peft.code_evaluation.problems import CodeProblem
from moa_peft.code_evaluation.sandbox import MEMORY_MIB, TIMEOUT_S, Outcome, check_sandbox, run_program
from moa_peft.errors import UserError
from moa_peft.intervals import Interval, mean_interval, require_scipy, wilson_interval


@dataclass(frozen=True, kw_only=True)
class PassAtK:
    """pass@k over problems.

    Attributes:
        value: the mean over problems.
        interval: its 95 % bootstrap interval over problems (`mean_interval`); Wilson's where the estimates of all
            problems are 0 or all are 1; None for a single problem.
    """

    value: float
    interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class CodeScore:
    """What came of all samples of all problems.

    Attributes:
        outcomes: for each task id, how each of its samples ended, in their order.
        pass_at: pass@k by k.
    """

    outcomes: dict[str, tuple[Outcome, ...]]
    pass_at: dict[int, PassAtK]

    @property
    def reasons(self) -> dict[str, int]:
        """How many samples ended for each reason, most frequent first; errors are counted by their kind."""
        counts = Counter(_kind(outcome.reason) for samples in self.outcomes.values() for outcome in samples)
        return dict(counts.most_common())

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON values; shares run from 0 to 1."""
        return {
            "num_problems": len(self.outcomes),
            "num_samples": sum(map(len, self.outcomes.values())),
            "pass_at": {
                str(k): {
                    "value": estimate.value,
                    "interval_95": None
                    if estimate.interval is None
                    else [estimate.interval.low, estimate.interval.high],
                }
                for k, estimate in self.pass_at.items()
            },
            "reasons": self.reasons,
            "problems": [
                {
                    "task_id": task_id,
                    "num_passed": sum(outcome.passed for outcome in samples),
                    "reasons": [outcome.reason for outcome in samples],
                }
                for task_id, samples in self.outcomes.items()
            ],
        }


def score_code(
    problems: Sequence[CodeProblem],
    completions: Sequence[Sequence[str]],
    *,
    k: Sequence[int] = (1,),
    workers: int = 1,
    timeout_s: float = TIMEOUT_S,
    memory_mib: int = MEMORY_MIB,
    allow_network: bool = False,
    console: Console | None = None,
) -> CodeScore:
    """Run every sample against its problem's tests and estimate pass@k.

    This executes what a model wrote. Call it only with the user's permission (`sandbox.require_permission`).

    Args:
        problems: the problems, with different task ids.
        completions: for each problem, the model's answers (without the prompt); the numbers of answers may differ.
        k: for which k to estimate pass@k; each at most the smallest number of answers.
        workers: how many programs run at the same time; more than there are processors makes some time out.
        timeout_s, memory_mib, allow_network: limits of each program, see `sandbox.run_program`.
        console: where a progress bar is shown; None shows none.

    Returns:
        The outcomes and pass@k.

    Raises:
        UserError: a setting is out of range, the lengths do not fit, scipy is missing, or the machine cannot isolate
            programs. All is checked before the first program runs.
    """
    _check_samples(problems, completions, k, workers)
    require_scipy()
    check_sandbox(timeout_s=timeout_s, memory_mib=memory_mib, allow_network=allow_network)
    samples = [(row, column) for row, answers in enumerate(completions) for column in range(len(answers))]
    outcomes: dict[tuple[int, int], Outcome] = {}

    def run(row: int, column: int) -> Outcome:
        return run_program(
            solution_code(problems[row], completions[row][column]),
            tests=problems[row].tests,
            timeout_s=timeout_s,
            memory_mib=memory_mib,
            allow_network=allow_network,
        )

    with ThreadPoolExecutor(workers) as pool, Progress(console=console, disable=console is None) as bar:
        task = bar.add_task("running programs", total=len(samples))
        places: dict[Future[Outcome], tuple[int, int]] = {pool.submit(run, *place): place for place in samples}
        try:
            for future in as_completed(places):
                outcomes[places[future]] = future.result()
                bar.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    by_problem = [
        tuple(outcomes[row, column] for column in range(len(answers))) for row, answers in enumerate(completions)
    ]
    correct = [[outcome.passed for outcome in samples] for samples in by_problem]
    return CodeScore(
        outcomes={problem.task_id: samples for problem, samples in zip(problems, by_problem, strict=True)},
        pass_at={size: PassAtK(value=mean_pass_at_k(correct, size), interval=_interval(correct, size)) for size in k},
    )


def _check_samples(
    problems: Sequence[CodeProblem], completions: Sequence[Sequence[str]], k: Sequence[int], workers: int
) -> None:
    if not problems:
        raise UserError("problems is empty; give at least one.")
    if len(problems) != len(completions):
        raise UserError(
            f"completions has {len(completions)} rows for {len(problems)} problems; give one row for each."
        )
    if len({problem.task_id for problem in problems}) != len(problems):
        raise UserError("problems holds the same task_id twice; give each problem once.")
    for problem, answers in zip(problems, completions, strict=True):
        if isinstance(answers, str) or not answers:
            raise UserError(f"completions of {problem.task_id}: {answers!r} must be a list of at least one text.")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise UserError(f"workers={workers!r} must be a positive whole number.")
    if not k:
        raise UserError("k is empty; give at least one whole number, such as 1.")
    for size in k:
        pass_at_k(min(map(len, completions)), 0, size)


def _interval(correct: Sequence[Sequence[bool]], k: int) -> Interval | None:
    if len(correct) < 2:
        return None
    shares = [pass_at_k(len(samples), sum(samples), k) for samples in correct]
    if max(shares) == 0 or min(shares) == 1:
        return wilson_interval(sum(share == 1 for share in shares), len(shares))
    return mean_interval(shares)


def _kind(reason: str) -> str:
    """The reason without the message of an error: "error: NameError: name 'x' ..." is "error: NameError"."""
    return ": ".join(reason.split(": ")[:2])
