"""What a person sees during training: a bar with loss, speed and time left, or plain lines outside a terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgress(TrainerCallback):
    """Shows step, loss, tokens per second and time left on the main process."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._losses: dict[str, float] = {}
        self._started_s = 0.0
        self._first_step = 0
        self._first_tokens = 0
        self._evaluation_steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the bar."""
        self._started_s = time.monotonic()
        self._first_step = state.global_step
        self._first_tokens = int(state.num_input_tokens_seen)
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step, status="")
        self._progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=state.global_step, status=self._status(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the losses; without a terminal, print one line."""
        shown = {name: logs[name] for name in ("loss", "eval_loss") if logs and name in logs}
        if not shown:
            return
        self._losses.update(shown)
        self._evaluation_steps = 0
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, status=self._status(state))
        elif state.is_world_process_zero:
            line = f"step {state.global_step}/{state.max_steps}  {self._status(state)}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say that the bar stands still because the validation rows are scored."""
        self._evaluation_steps += 1
        if self._progress is not None and self._task is not None:
            status = f"validating, batch {self._evaluation_steps}  {self._status(state)}"
            self._progress.update(self._task, status=status)

    def close(self) -> None:
        """Stop the bar; safe to call twice, and needed when training ends by an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _status(self, state: TrainerState) -> str:
        elapsed_s = max(time.monotonic() - self._started_s, 1e-6)
        steps = state.global_step - self._first_step
        parts = [f"{name.replace('eval_loss', 'validation loss')} {loss:.4f}" for name, loss in self._losses.items()]
        tokens = int(state.num_input_tokens_seen) - self._first_tokens
        if tokens > 0:
            parts.append(f"{tokens / elapsed_s:,.0f} tokens/s")
        if steps > 0:
            parts.append(f"{format_duration((state.max_steps - state.global_step) * elapsed_s / steps)} left")
        return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
