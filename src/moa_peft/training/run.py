"""One training run from a recipe to a folder with an adapter: check, load, inject, train, save, record."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback

from moa_peft.base_models import load_config, load_tokenizer, pad_token_id
from moa_peft.data import (
    CompletionCollator,
    TokenizationReport,
    load_examples,
    split_validation,
    tokenize_examples,
)
from moa_peft.environment import library_versions, peak_memory_bytes
from moa_peft.errors import UserError
from moa_peft.files import move_files
from moa_peft.generation import max_positions
from moa_peft.meta_model import adapter_on_meta
from moa_peft.training.adapters import adapter_config, build_model, router_parameters
from moa_peft.training.arguments import MoATrainingArguments
from moa_peft.training.card import add_run_to_card
from moa_peft.training.interrupts import StopOnSignal, TrainingInterrupted
from moa_peft.training.option_checks import check_hub, check_optimizer
from moa_peft.training.progress import TrainingProgress
from moa_peft.training.recipe import TrainRecipe
from moa_peft.training.run_folder import RECIPE_FILE, STAGING, TENSORBOARD, RunFolder, check_disk_space
from moa_peft.training.step_times import StepTimer
from moa_peft.training.trainer import MoATrainer


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run produced.

    Attributes:
        output_dir: the folder, which is also the adapter folder.
        steps: optimiser steps of the whole run, earlier parts of a resumed run included.
        saved_step: the step whose weights were saved at the top of the folder (the best by validation loss).
        train_loss: mean training loss of the last logged steps, None when nothing was logged.
        validation_loss: validation loss of the saved weights, None without validation.
        trainable_parameters: number of trainable parameters.
        train_s: seconds spent training in this process.
    """

    output_dir: Path
    steps: int
    saved_step: int
    train_loss: float | None
    validation_loss: float | None
    trainable_parameters: int
    train_s: float


@dataclass(kw_only=True)
class _Prepared:
    arguments: MoATrainingArguments
    config: PeftConfig
    tokenizer: PreTrainedTokenizerBase
    train_rows: Any
    validation_rows: Any
    report: TokenizationReport
    validation_report: TokenizationReport | None
    seconds: float


def train(
    recipe: TrainRecipe, *, callbacks: Sequence[TrainerCallback] = (), console: Console | None = None
) -> RunResult:
    """Run a recipe.

    Everything that can be wrong is checked before the output folder is touched. Under `torchrun` or
    `accelerate launch` every process calls this, and only the main one writes.

    Args:
        recipe: from `load_recipe` or `parse_recipe`.
        callbacks: further transformers callbacks.
        console: where progress goes; standard error by default.

    Returns:
        The result; the same facts and more are in `run.json`.

    Raises:
        UserError: a setting, the data, the model or the folder is wrong.
        TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint was saved and the message says how to resume.
    """
    console = console or Console(stderr=True)
    folder = RunFolder(recipe.options.output_dir)
    folder.check(recipe)
    prepared = _prepare(recipe, folder)
    arguments = prepared.arguments
    is_main = arguments.process_index == 0
    if is_main:
        console.print(prepared.report.summary(), highlight=False, markup=False, soft_wrap=True)
    started_s = time.monotonic()
    set_seed(arguments.seed)
    model = build_model(recipe, prepared.config, arguments)
    trainable, total = model.get_nb_trainable_parameters()
    if is_main:
        console.print(f"{recipe.options.method}: {trainable:,} trainable parameters of {total:,}", highlight=False)
    record = _first_record(recipe, prepared, trainable=trainable, total=total)
    record["timings"]["load_model_s"] = round(time.monotonic() - started_s, 2)
    stop = StopOnSignal(console)
    progress = TrainingProgress(console)
    given = next((callback for callback in callbacks if isinstance(callback, StepTimer)), None)
    timer = given or StepTimer()
    try:
        trainer = MoATrainer(
            model,
            args=arguments,
            train_dataset=prepared.train_rows,
            eval_dataset=prepared.validation_rows,
            data_collator=CompletionCollator(pad_token_id(prepared.tokenizer)),
            callbacks=[*callbacks, progress, stop, *([] if given else [timer])],
            router_parameters=router_parameters(model),
            prompt_mask=getattr(prepared.config, "granularity", "token") == "sequence",
        )
    except (ValueError, RuntimeError, ImportError, HfHubHTTPError) as error:
        # Such as report_to with a tracker that is not installed, or a hub_model_id that belongs to someone else.
        raise UserError(f"recipe: the trainer refuses its options: {error}") from error
    # The trainer's own printing of every log line, which comes with the switched-off tqdm bar.
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder.path / TENSORBOARD)
    PartialState().wait_for_everyone()
    checkpoint = _open(recipe, folder, record, console) if is_main else None
    PartialState().wait_for_everyone()
    checkpoint = folder.last_checkpoint() if recipe.options.resume else checkpoint
    try:
        with stop.installed():
            result = _train_and_save(trainer, folder, record, prepared.tokenizer, stop, timer, checkpoint)
    except BaseException as error:
        if is_main:
            _record_failure(folder, error, trainer)
        raise
    finally:
        progress.close()
    return result


def _prepare(recipe: TrainRecipe, folder: RunFolder) -> _Prepared:
    """Everything that is checked and made before the model's weights are loaded."""
    started_s = time.monotonic()
    options, data = recipe.options, recipe.data
    config = adapter_config(recipe)
    examples = load_examples(data.path, split=data.split, limit=data.limit)
    has_validation = data.validation_size > 0
    arguments = recipe.training_arguments(checkpoints=folder.checkpoints, has_validation=has_validation)
    remote = {"trust_remote_code": options.trust_remote_code, "revision": options.revision}
    base_config = load_config(options.model, **remote)
    on_meta = adapter_on_meta(config, base_config)
    trainable, _ = on_meta.get_nb_trainable_parameters()
    check_optimizer(arguments, on_meta)
    check_hub(arguments)
    check_disk_space(
        folder.path,
        trainable_parameters=trainable,
        checkpoints_kept=arguments.save_total_limit if arguments.save_strategy != "no" else 0,
        save_only_model=arguments.save_only_model,
    )
    tokenizer = load_tokenizer(options.model, **remote)
    validation: list[Any] = []
    if has_validation:
        examples, validation = split_validation(examples, size=data.validation_size, seed=arguments.seed)
    settings: dict[str, Any] = {
        "template": data.template,
        "max_length": data.max_length,
        "loss_on": data.loss_on,
        "too_long": data.too_long,
    }
    train_rows, report = tokenize_examples(examples, tokenizer, **settings, progress=arguments.process_index == 0)
    validation_rows, validation_report = None, None
    if validation:
        validation_rows, validation_report = tokenize_examples(validation, tokenizer, **settings)
    if len(train_rows) == 0:
        raise UserError(
            f"data.path: no row of {data.path!r} is left to train on.\n{report.summary()}\n"
            "Raise data.max_length, or check the answers."
        )
    positions = max_positions(base_config)
    longest = max(max(rows["length"]) for rows in (train_rows, validation_rows) if rows is not None)
    if positions is not None and longest > positions:
        raise UserError(
            f"data.max_length: {data.max_length} allows a row of {longest} tokens, but {options.model!r} has "
            f"{positions} positions.\nSet data.max_length: {positions} or less."
        )
    return _Prepared(
        arguments=arguments,
        config=config,
        tokenizer=tokenizer,
        train_rows=train_rows,
        validation_rows=validation_rows,
        report=report,
        validation_report=validation_report,
        seconds=round(time.monotonic() - started_s, 2),
    )


def _open(recipe: TrainRecipe, folder: RunFolder, record: dict[str, Any], console: Console) -> Path | None:
    """Create the folder and say where a resumed run goes on."""
    folder.open(recipe, record)
    for name in folder.remove_broken_checkpoints():
        console.print(f"Removed {name}, which was not written to its end.", highlight=False)
    checkpoint = folder.last_checkpoint() if recipe.options.resume else None
    if recipe.options.resume:
        where = f"Resuming from {checkpoint.name}." if checkpoint else "No checkpoint was saved yet: starting anew."
        console.print(where, highlight=False)
    return checkpoint


def _train_and_save(
    trainer: MoATrainer,
    folder: RunFolder,
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    stop: StopOnSignal,
    timer: StepTimer,
    checkpoint: Path | None,
) -> RunResult:
    started_s = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    train_s = round(time.monotonic() - started_s, 2)
    state = trainer.state
    if stop.signal_number is not None and state.global_step < state.max_steps:
        raise TrainingInterrupted(
            f"Stopped at step {state.global_step} of {state.max_steps}; a checkpoint is saved.\n"
            f"To go on: moa train {folder.path / RECIPE_FILE} --resume",
            signal_number=stop.signal_number,
        )
    results = {**_results(trainer), "peak_memory_bytes": _peak_memory_bytes(trainer.args.device)}
    timings = {**record["timings"], "train_s": train_s, "median_step_s": timer.median_s}
    _save(trainer, folder, {**record, "results": results}, tokenizer)
    if trainer.args.process_index == 0:
        folder.close("completed", results=results, timings=timings, log=state.log_history)
    return RunResult(
        output_dir=folder.path,
        steps=results["steps"],
        saved_step=results["saved_step"],
        train_loss=results["train_loss"],
        validation_loss=results["validation_loss"],
        trainable_parameters=record["parameters"]["trainable"],
        train_s=train_s,
    )


def _save(trainer: MoATrainer, folder: RunFolder, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write adapter, tokenizer and card to a temporary folder, then move them to the top of the run's folder."""
    staging = folder.path / STAGING
    try:
        trainer.save_model(str(staging))
        if trainer.args.process_index == 0:
            tokenizer.save_pretrained(staging)
            (staging / "training_args.bin").unlink(missing_ok=True)
            add_run_to_card(staging, record)
            folder.announce_files(file.name for file in staging.iterdir())
            move_files(staging, folder.path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _results(trainer: MoATrainer) -> dict[str, Any]:
    state = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    validation = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    is_best = bool(trainer.args.load_best_model_at_end and state.best_model_checkpoint)
    return {
        "steps": state.global_step,
        "saved_step": state.best_global_step if is_best else state.global_step,
        "train_loss": losses[-1] if losses else None,
        "validation_loss": (state.best_metric if is_best else validation[-1]) if validation else None,
        "epochs": state.epoch,
        "tokens": int(state.num_input_tokens_seen),
    }


def _peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory so far: of the tensors on a GPU, of the whole process elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def _first_record(recipe: TrainRecipe, prepared: _Prepared, *, trainable: int, total: int) -> dict[str, Any]:
    arguments = prepared.arguments
    validation_rows = 0 if prepared.validation_rows is None else len(prepared.validation_rows)
    validation_report = prepared.validation_report
    return {
        "recipe": recipe.to_dict(),
        "template": recipe.data.template,
        "adapter_config": prepared.config.to_dict(),
        "training_arguments": arguments.to_dict(),
        "seeds": {"seed": arguments.seed, "data_seed": arguments.data_seed},
        "parameters": {"trainable": trainable, "total": total},
        "data": {
            "train_rows": len(prepared.train_rows),
            "validation_rows": validation_rows,
            "train": prepared.report.to_dict(),
            "validation": None if validation_report is None else validation_report.to_dict(),
        },
        "versions": library_versions(),
        "hardware": {
            "device": str(arguments.device),
            "name": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "processes": arguments.world_size,
            "threads": torch.get_num_threads(),
        },
        "timings": {"prepare_s": prepared.seconds},
    }


def _record_failure(folder: RunFolder, error: BaseException, trainer: MoATrainer) -> None:
    status = "interrupted" if isinstance(error, KeyboardInterrupt | TrainingInterrupted) else "failed"
    # The disk may be full: then this write fails too, and the first error is the one to report.
    with suppress(OSError):
        folder.close(
            status,
            error=f"{type(error).__name__}: {error}",
            results={"steps": trainer.state.global_step},
            log=trainer.state.log_history,
        )
