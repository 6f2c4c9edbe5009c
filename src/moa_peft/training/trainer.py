"""The trainer: transformers' own, with the loss of labelled positions, our parameter groups and whole checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from moa_peft.errors import UserError
from moa_peft.pooling import PROMPT_MASK, prompt_mask
from moa_peft.training.arguments import MoATrainingArguments
from moa_peft.training.labelled_positions import only_labelled_positions
from moa_peft.training.optimizer_groups import parameter_groups


class LossNotFinite(UserError):
    """Training diverged."""


class MoATrainer(Trainer):
    """`transformers.Trainer` for causal language models on tokenised rows with labels.

    loss = sum over labelled positions of cross entropy / number of labelled positions

    where the number counts every micro-batch of the accumulation and every process, so that accumulation and data
    parallelism change nothing. Labels are not passed to the model; see `labelled_positions` for the reason.
    """

    args: MoATrainingArguments

    def __init__(
        self,
        model: nn.Module,
        *,
        args: MoATrainingArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        router_parameters: Iterable[nn.Parameter] = (),
        prompt_mask: bool = False,
    ) -> None:
        """Set up the trainer.

        Args:
            model: a causal language model with adapters.
            args: the options.
            train_dataset: rows with `input_ids` and `labels` (-100 where there is none).
            eval_dataset: rows of the same kind, or None.
            data_collator: pads rows to a batch with `input_ids`, `attention_mask`, `labels`.
            callbacks: further transformers callbacks.
            router_parameters: parameters that `args.router_learning_rate` applies to.
            prompt_mask: also pass `prompt_mask` [B, T], True on prompt tokens, which a router that pools over the
                prompt needs because it never sees the labels.
        """
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            callbacks=callbacks,
        )
        # Our loss divides by the number of items itself, so the trainer must count them whatever the model accepts.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._router_parameters = list(router_parameters)
        self._passes_prompt_mask = prompt_mask
        self._evaluated: list[torch.Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Forward pass and loss of one micro-batch.

        Args:
            model: the model, possibly wrapped for distributed training.
            inputs: the batch, with `labels` [B, T].
            return_outputs: also return the model's outputs (their logits are those of the labelled positions).
            num_items_in_batch: labelled positions of the whole optimiser step on all processes; None: of this batch.

        Returns:
            The loss, a float32 scalar that is 0 for a batch without labels, or (loss, outputs).
        """
        labels_BT = inputs["labels"]
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if self._passes_prompt_mask:
            model_inputs[PROMPT_MASK] = prompt_mask(labels_BT, inputs["attention_mask"])
        output_layer = self.accelerator.unwrap_model(model).get_output_embeddings()
        with only_labelled_positions(output_layer, labels_BT) as positions:
            outputs = model(**model_inputs)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        loss_sum = positions.loss_sum(outputs.logits, label_smoothing=smoothing)
        count = positions.targets_N.numel()
        if not model.training:
            self._evaluated.append(torch.stack((loss_sum.detach().double(), loss_sum.new_tensor(count).double())))
        items = torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch, device=loss_sum.device)
        loss = loss_sum / items.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count spans all processes, whose gradients data parallelism averages.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over labelled positions, independent of the batch size."""
        self._evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._evaluated and output.metrics is not None:
            totals = self.accelerator.reduce(torch.stack(self._evaluated).sum(dim=0), reduction="sum")
            assert isinstance(totals, torch.Tensor)
            loss_sum, count = totals.tolist()
            output.metrics[f"{prefix}_loss"] = loss_sum / max(count, 1.0)
        self._evaluated = []
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimiser that `args.optim` names over our parameter groups."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            target: Any = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            options.setdefault(
                "params",
                parameter_groups(
                    target,
                    learning_rate=self.args.learning_rate,
                    router_learning_rate=self.args.router_learning_rate,
                    weight_decay=self.args.weight_decay,
                    router_parameters=self._router_parameters,
                ),
            )
            self.optimizer_cls_and_kwargs = (optimizer_class, options)
        return super().create_optimizer(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and stop the run at a loss that is not finite instead of training on."""
        loss = logs.get("loss", logs.get("eval_loss"))
        super().log(logs, start_time)
        if loss is not None and not math.isfinite(loss):
            raise LossNotFinite(
                f"training: the loss became {loss} by step {self.state.global_step}.\n"
                "Lower learning_rate, lengthen the warm-up, set max_grad_norm: 1.0, or use dtype: bfloat16 instead of "
                "float16."
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint; one that cannot be finished (a full disk, an interrupt) is removed again."""
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise
