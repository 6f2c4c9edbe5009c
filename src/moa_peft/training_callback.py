"""Auxiliary losses in every transformers `Trainer`: their scale, and their values in the logs.

`register_training_callback` enters one callback among those that each `Trainer`, and so each TRL trainer, starts with.
A model without auxiliary losses is left alone.

A trainer takes the gradient of the mean of its micro-batches' losses per optimiser step, so each micro-batch's
auxiliary losses are divided by the number of micro-batches in the step. The last step of an epoch may have fewer:
their number follows from the length of the data loader. Where it has no length (a stream), the trainer itself does not
know that the data end, and every step is taken to be whole.
"""

from typing import Any

import torch
import transformers.trainer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from moa_peft.auxiliary import Auxiliary, Scale, auxiliaries, read_losses


class AuxiliaryLossCallback(TrainerCallback):
    """Sets the scale of the auxiliary losses for each optimiser step, and adds their values to the logs."""

    def __init__(self) -> None:
        self._layers: list[Auxiliary] = []
        self._step_in_epoch = 0
        self._resumes = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the layers, and forget what earlier forwards left in their logs."""
        self._layers = auxiliaries(kwargs["model"])
        self._resumes = not args.ignore_data_skip
        for layer in self._layers:
            layer.log.clear()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting steps; a resumed run starts within its first epoch."""
        steps = _steps_per_epoch(args, kwargs.get("train_dataloader"))
        self._step_in_epoch = state.global_step % steps if self._resumes and steps else 0
        self._resumes = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the scale of the micro-batches of this optimiser step."""
        self._step_in_epoch += 1
        if not self._layers:
            return
        micro_batches = _micro_batches(args, kwargs.get("train_dataloader"), self._step_in_epoch)
        # The gradients of the replicas of `nn.DataParallel` are added up.
        scale = _precision_scale(kwargs.get("optimizer"), kwargs["model"]) / (micro_batches * max(1, args.n_gpu))
        self._set(scale)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave no scale behind for forwards outside the trainer's steps."""
        self._set(None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the layers."""
        self._set(None)
        self._layers = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the losses to the training logs, which the reporting callbacks after this one then see."""
        if not self._layers or logs is None or "loss" not in logs:
            return
        values = read_losses(kwargs["model"])
        logs.update(values)
        # The trainer has entered a copy of the logs into its history before it calls its callbacks.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def _set(self, scale: Scale | None) -> None:
        for layer in self._layers:
            layer.scale = scale


def _steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    """Optimiser steps of an epoch; None where the data loader has no length."""
    if not has_length(dataloader):
        return None
    return max(1, -(-len(dataloader) // args.gradient_accumulation_steps))


def _micro_batches(args: TrainingArguments, dataloader: Any, step: int) -> int:
    """How many micro-batches the `step`-th optimiser step of an epoch has, counted from 1."""
    if step != _steps_per_epoch(args, dataloader):
        return args.gradient_accumulation_steps
    return len(dataloader) % args.gradient_accumulation_steps or args.gradient_accumulation_steps


def _precision_scale(optimizer: Any, model: nn.Module) -> Scale:
    """What the trainer multiplies its loss by so that float16 gradients do not underflow."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None:
        # As a tensor on the device: asking for the number would wait for it.
        return scaler.scale(torch.ones((), device=next(model.parameters()).device))
    # DeepSpeed keeps its own scale in the optimiser that accelerate wraps.
    return getattr(getattr(optimizer, "optimizer", None), "loss_scale", 1.0)


def register_training_callback() -> None:
    """Let every `Trainer` made from now on start with the callback. Idempotent."""
    callbacks: list[Any] = transformers.trainer.DEFAULT_CALLBACKS
    if AuxiliaryLossCallback not in callbacks:
        callbacks.append(AuxiliaryLossCallback)
