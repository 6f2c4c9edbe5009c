"""How long optimiser steps take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

NUM_UNTIMED_STEPS = 1
"""Steps that no summary counts: the first one allocates memory and compiles kernels."""


class StepTimer(TrainerCallback):
    """Measures every optimiser step.

    Attributes:
        seconds: duration of each step so far, without validation, logging and saving after it.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = 0.0
        self.seconds: list[float] = []

    @property
    def fastest_s(self) -> float:
        """The fastest of the timed steps: what the machine can do."""
        return min(self.seconds[NUM_UNTIMED_STEPS:])

    @property
    def median_s(self) -> float | None:
        """Median of the timed steps; None where there is none."""
        timed = self.seconds[NUM_UNTIMED_STEPS:]
        return statistics.median(timed) if timed else None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began_s = self._clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self.seconds.append(self._clock() - self._began_s)
