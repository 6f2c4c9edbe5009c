"""Ctrl-C and SIGTERM during training: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingInterrupted(Exception):
    """Training stopped by a signal after a checkpoint was saved; the message says how to go on.

    Attributes:
        signal_number: the signal, so that the process can exit with 128 + signal_number.
    """

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopOnSignal(TrainerCallback):
    """Turns a signal into a checkpoint and a stop at the end of the current step.

    Attributes:
        signal_number: the first signal received, or None.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.signal_number: int | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM while active (in the main thread; other threads receive no signals)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the trainer to save and stop."""
        if self.signal_number is not None:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
        self._console.print("\nStopping: finishing this step and saving a checkpoint. Ctrl-C again stops at once.")
