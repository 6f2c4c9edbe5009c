"""Fitting a training run into the time that is left.

Three steps are timed on a run that is thrown away, and the number of steps of the real run follows from them. The
alternative, changing `max_steps` inside a running trainer, would leave a learning-rate schedule that was made for
another number, and a recipe that does not repeat the run. The price is the time of those few steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Clock = Callable[[], float]

NUM_TIMED_STEPS = 3
MIN_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class TimeBudget:
    """A span of time with what must still fit into it.

    Attributes:
        total_s: seconds in all.
        started_s: the clock's value at the start.
        clock: a monotonic clock in seconds.
    """

    total_s: float
    started_s: float
    clock: Clock = field(default=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started_s

    def left_s(self, *, reserve_s: float = 0.0) -> float:
        """Seconds left when `reserve_s` are kept for later; negative when there are none."""
        return self.total_s - self.elapsed_s - reserve_s


def fitted_steps(*, step_s: float, left_s: float, max_steps: int) -> int:
    """How many steps of `step_s` seconds fit into `left_s`: at least `MIN_STEPS`, at most `max_steps`."""
    assert step_s > 0
    return max(MIN_STEPS, min(max_steps, int(left_s / step_s)))


class StopInTime(TrainerCallback):
    """Ends training early when the steps turn out slower than timed, so that the scoring still fits in.

    Attributes:
        stopped: whether it did.
    """

    def __init__(self, budget: TimeBudget, *, reserve_s: float) -> None:
        self._budget = budget
        self._reserve_s = reserve_s
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the trainer to stop when the time for training is over."""
        if state.global_step >= MIN_STEPS and self._budget.left_s(reserve_s=self._reserve_s) <= 0:
            self.stopped = state.global_step < state.max_steps
            control.should_training_stop = True
