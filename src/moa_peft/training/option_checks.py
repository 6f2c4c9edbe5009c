"""Checks of the trainer's options that the trainer itself makes late, with the weights loaded, or never."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import OfflineModeIsEnabled
from torch import nn
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import SchedulerType

from moa_peft.errors import UserError
from moa_peft.training.arguments import MoATrainingArguments
from moa_peft.training.trainer import MoATrainer

_OPTIM_ARGS = re.compile(r"\s*\w+\s*=\s*[^=,]+(,\s*\w+\s*=\s*[^=,]+)*")
_METRICS = ("loss", "eval_loss")
_TRIAL_STEPS = 10


def check_value(holds: bool, name: str, value: Any, allowed: str) -> None:
    """Raise a UserError that names the setting, the value and what is allowed, unless `holds`."""
    if not holds:
        raise UserError(f"{name}: {value!r} is not allowed; give {allowed}.")


def check_ranges(given: Mapping[str, Any]) -> None:
    """Ranges of options that the trainer would fail on late, or train on with a wrong meaning.

    Args:
        given: options by name, converted to their types.

    Raises:
        UserError: naming the option.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        check_value(given.get(name, 1) >= 1, name, given.get(name), "at least 1")
    for name in ("learning_rate", "router_learning_rate", "weight_decay", "max_grad_norm"):
        value = given.get(name)
        check_value(value is None or 0 <= value < math.inf, name, value, "a number of at least 0")
    for name in ("adam_beta1", "adam_beta2"):
        check_value(0 <= given.get(name, 0.0) < 1, name, given.get(name), "a number of at least 0 and below 1")
    for name in ("seed", "data_seed"):
        value = given.get(name)
        check_value(value is None or 0 <= value < 2**32, name, value, "0 to 4294967295")
    for name in ("save_steps", "eval_steps"):
        value = given.get(name)
        check_value(value is None or value > 0, name, value, "a number of steps, or a share of all steps below 1")
    smoothing = given.get("label_smoothing_factor", 0.0)
    check_value(0 <= smoothing < 1, "label_smoothing_factor", smoothing, "a number of at least 0 and below 1")
    epochs = given.get("num_train_epochs", 1)
    check_value(epochs > 0, "num_train_epochs", epochs, "more than 0")
    steps = given.get("max_steps", -1)
    check_value(steps == -1 or steps >= 1, "max_steps", steps, "at least 1, or -1 to follow num_train_epochs")
    workers = given.get("dataloader_num_workers", 0)
    check_value(workers >= 0, "dataloader_num_workers", workers, "at least 0")
    optim_args = given.get("optim_args")
    check_value(
        optim_args is None or _OPTIM_ARGS.fullmatch(optim_args) is not None,
        "optim_args",
        optim_args,
        "name=value pairs with commas between them, such as 'beta3=0.999,alpha=5.0'",
    )
    metric = given.get("metric_for_best_model")
    check_value(metric is None or metric in _METRICS, "metric_for_best_model", metric, " or ".join(_METRICS))


def check_best_model(given: Mapping[str, Any], *, has_validation: bool) -> None:
    """Refuse `load_best_model_at_end` where nothing says which checkpoint is the best, or none is kept.

    Args:
        given: options by name, with the defaults of the strategies filled in.
        has_validation: there are validation rows.

    Raises:
        UserError: naming what is missing.
    """
    if not given.get("load_best_model_at_end"):
        return
    if not has_validation:
        raise UserError(
            "load_best_model_at_end: true needs validation rows, but data.validation_size is 0.\n"
            "Set data.validation_size (for example 0.05), or load_best_model_at_end: false."
        )
    for name, verb in (("eval_strategy", "nothing is evaluated"), ("save_strategy", "no checkpoint is saved")):
        if given.get(name, "no") == "no":
            raise UserError(
                f"load_best_model_at_end: true, but with {name}: 'no' {verb}.\n"
                f"Set {name} to steps or epoch, or load_best_model_at_end: false."
            )


def check_optimizer(arguments: MoATrainingArguments, model: nn.Module) -> None:
    """Build the optimiser and the schedule once over a throw-away parameter.

    Args:
        arguments: the trainer's options.
        model: the model with its adapters; some optimisers pick layers of it by name. Its weights are not read.

    Raises:
        UserError: the optimiser cannot be had, or the schedule does not take its options.
    """
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([parameter], lr=1.0)
    try:
        optimizer_class, options = MoATrainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
        picks_own_parameters = options.keys() & {"params", "model", "optimizer_dict"}
        if not picks_own_parameters and not is_optimizer_factory(optimizer_class):
            optimizer_class([parameter], **options)
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError, KeyError) as error:
        raise UserError(
            f"optim: {_text(arguments.optim)!r} with optim_args: {arguments.optim_args!r} cannot be used: {error}"
        ) from error
    kind = arguments.lr_scheduler_type
    try:
        schedule = get_scheduler(
            kind,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=_TRIAL_STEPS,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            for _ in range(_TRIAL_STEPS):
                optimizer.step()
                schedule.step()
    except (ValueError, TypeError, AttributeError) as error:
        standard = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}
        function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]
        own = [name for name in inspect.signature(function).parameters if name not in standard]
        raise UserError(
            f"lr_scheduler_kwargs: {arguments.lr_scheduler_kwargs!r} does not fit lr_scheduler_type: "
            f"{_text(kind)!r}: {error}\nIts keys: {', '.join(own) or 'none'}."
        ) from error


def check_hub(arguments: MoATrainingArguments) -> None:
    """With `push_to_hub`, ask the hub who is logged in, before hours of training whose result could not be pushed.

    Raises:
        UserError: the hub cannot be reached, or knows no login.
    """
    if not arguments.push_to_hub:
        return
    try:
        if is_offline_mode():
            raise OfflineModeIsEnabled("offline mode is on (HF_HUB_OFFLINE)")
        HfApi().whoami()
    # Network, proxy, login and offline mode fail with errors of different libraries that share no base class; all of
    # them mean that nothing could be pushed.
    except Exception as error:
        raise UserError(
            f"push_to_hub: the hub does not let anything be pushed: {str(error).strip() or type(error).__name__}\n"
            "Go online and log in with `hf auth login`. Or leave push_to_hub out, and after training run: "
            "hf upload USER/NAME OUTPUT_DIR . --exclude 'checkpoints/*'"
        ) from error


def _text(choice: Any) -> str:
    """An option of an enumeration as a recipe writes it."""
    return str(getattr(choice, "value", choice))
