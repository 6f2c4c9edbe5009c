"""The trainer's options: everything of `transformers.TrainingArguments`, plus what a mixture of adapters needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class MoATrainingArguments(TrainingArguments):
    """`TrainingArguments` with a learning rate for the routers, a warm-up in epochs, and our defaults.

    Raises:
        ValueError: a combination that transformers or we refuse.
    """

    router_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of the routers. Default: learning_rate."},
    )
    warmup_epochs: float | None = field(
        default=None,
        metadata={"help": "Length of the linear warm-up in epochs, fractions allowed. Replaces warmup_steps."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    include_num_input_tokens_seen: str = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="non_padding", metadata={"help": "Which tokens the tokens per second count: non_padding, all or no."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite from the log. The run stops at one instead."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The collator picks its columns itself, so nothing is removed."}
    )
    disable_tqdm: bool | None = field(default=True, metadata={"help": "The progress display is our own."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints to keep. 2 keeps the best and the last."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs is not None:
            if self.warmup_steps:
                raise ValueError("warmup_epochs and warmup_steps are both set; keep one")
            if self.warmup_epochs < 0:
                raise ValueError(f"warmup_epochs must not be negative, got {self.warmup_epochs}")
        if self.router_learning_rate is not None and self.router_learning_rate < 0:
            raise ValueError(f"router_learning_rate must not be negative, got {self.router_learning_rate}")
        # transformers would wrap the model in torch.nn.DataParallel, whose replicas do not share our hooks.
        if self.n_gpu > 1:
            self._n_gpu = 1

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warm-up in optimiser steps; `warmup_epochs` counts as its share of `num_train_epochs`."""
        if self.warmup_epochs is None:
            return super().get_warmup_steps(num_training_steps)
        return min(num_training_steps, round(num_training_steps * self.warmup_epochs / self.num_train_epochs))
