"""One job of a study in a process of its own: train, score, leave a result file."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from moa_peft.adapter_loading import load_adapter
from moa_peft.environment import library_versions
from moa_peft.evaluation.folder import EvaluationFolder
from moa_peft.evaluation.run import check_set_lengths, score_sets, stored_predictions
from moa_peft.files import write_atomically
from moa_peft.study.data import StudyData
from moa_peft.study.jobs import Job, StudyFolder, job_digest, job_recipe
from moa_peft.study.records import ItemScores, RunRecord
from moa_peft.study.spec import StudySpec
from moa_peft.training import TrainRecipe, train
from moa_peft.training.interrupts import TrainingInterrupted
from moa_peft.training.run_folder import RUN_FILE
from moa_peft.training.trainer import LossNotFinite

EXIT_BUSY = 75
"""Another process works on this job."""
EXIT_INTERRUPTED = 130
_DIGITS = 6


def work(spec: StudySpec, job: Job, data: StudyData, folder: StudyFolder, threads: int) -> None:
    """Do a job and end the process; what is printed goes to the job's log.

    The exit code is 0, `EXIT_BUSY`, `EXIT_INTERRUPTED`, or 1 after an error, whose traceback is in the log.
    """
    log = folder.log(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    folder.lock(job).parent.mkdir(parents=True, exist_ok=True)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    lock = FileLock(folder.lock(job))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SystemExit(EXIT_BUSY) from None
    with log.open("a", encoding="utf-8") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        torch.set_num_threads(threads)
        try:
            do_job(spec, job, data, folder, console=Console(file=sys.stderr, width=120))
        except (TrainingInterrupted, KeyboardInterrupt) as error:
            print(error, file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED) from None
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
        finally:
            lock.release()


def _stop_with_parent() -> None:
    """Stop as after Ctrl-C when the study's own process is gone, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def do_job(spec: StudySpec, job: Job, data: StudyData, folder: StudyFolder, *, console: Console) -> None:
    """Train what is not trained yet, score what is not scored yet, write the result file."""
    digest = job_digest(spec, job, data={job.data: data})
    run = folder.run(job, digest)
    recipe = job_recipe(spec, job, data=data, output_dir=str(run))
    result: dict[str, Any] = {"digest": digest, "recipe": recipe.to_dict(), "versions": library_versions()}
    # Places on this machine say nothing of the result; its rows are in the digest.
    result["recipe"].pop("output_dir")
    result["recipe"]["data"].pop("path")
    if job.kind == "search":
        result |= _search(recipe, run, console)
    else:
        trained = _train(recipe, run, console)
        result["hardware"] = trained["hardware"]
        result["record"] = _score(job, recipe, data, run, trained, console).to_dict()
    file = folder.result(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result, ensure_ascii=False) + "\n")
    if job.kind == "search":
        shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def _search(recipe: TrainRecipe, run: Path, console: Console) -> dict[str, Any]:
    """What a try of a learning rate came to; without a loss where training diverged."""
    try:
        trained = _train(recipe, run, console)
    except LossNotFinite as error:
        console.print(error, markup=False)
        return {"validation_loss": None, "train_loss": None, "hardware": None}
    losses = {name: trained["results"][name] for name in ("validation_loss", "train_loss")}
    return {**losses, "hardware": trained["hardware"]}


def _train(recipe: TrainRecipe, run: Path, console: Console) -> dict[str, Any]:
    """The record of the job's training run, which is trained, or trained to its end, if that is missing."""
    file = run / RUN_FILE
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before.get("status") == "completed":
            return before
        recipe.options.resume = True
    else:
        # A process that was killed at the very start leaves a folder without a record.
        shutil.rmtree(run, ignore_errors=True)
    train(recipe, console=console)
    recipe.options.resume = False
    return json.loads(file.read_text(encoding="utf-8"))


def _score(
    job: Job, recipe: TrainRecipe, data: StudyData, run: Path, trained: Mapping[str, Any], console: Console
) -> RunRecord:
    options = recipe.options
    loaded = load_adapter(
        run,
        base=options.model,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        quantization=options.quantization,
        trust_remote_code=options.trust_remote_code,
    )
    evaluation = EvaluationFolder(run / "evaluation")
    # The run's folder belongs to one digest of everything that decides its predictions.
    with evaluation.locked():
        evaluation.open({}, sets={questions.name: {} for questions in data.sets}, command="moa compare")
        for scorings in dict.fromkeys(data.scorings(questions) for questions in data.sets):
            alike = [questions for questions in data.sets if data.scorings(questions) == scorings]
            settings = replace(data.settings, scorings=scorings)
            check_set_lengths(loaded.model, loaded.tokenizer, alike, settings)
            console.print(
                score_sets(loaded.model, loaded.tokenizer, alike, settings, folder=evaluation, console=console)
            )
        evaluation.write(complete=True)
    results, arguments = trained["results"], trained["training_arguments"]
    return RunRecord(
        row=job.row,
        data=job.data,
        seed=job.seed,
        method=options.method,
        learning_rate=arguments["learning_rate"],
        steps=results["steps"],
        tokens=results["tokens"],
        rows_seen=_rows_seen(trained),
        trainable_parameters=trained["parameters"]["trainable"],
        peak_memory_bytes=results.get("peak_memory_bytes"),
        step_seconds=trained["timings"].get("median_step_s"),
        validation_loss=results["validation_loss"],
        scores=tuple(_item_scores(data, evaluation)),
    )


def _rows_seen(trained: Mapping[str, Any]) -> int:
    """Training rows seen, over all steps; the last step of an epoch has what is left of the rows."""
    arguments, rows = trained["training_arguments"], trained["data"]["train_rows"]
    batch = arguments["per_device_train_batch_size"] * trained["hardware"]["processes"]
    if arguments["dataloader_drop_last"]:
        rows -= rows % batch
    accumulated = arguments["gradient_accumulation_steps"]
    steps_per_epoch = max(1, math.ceil(math.ceil(rows / batch) / accumulated))
    epochs, steps = divmod(trained["results"]["steps"], steps_per_epoch)
    return epochs * rows + steps * batch * accumulated


def _item_scores(data: StudyData, evaluation: EvaluationFolder) -> list[ItemScores]:
    found = []
    for questions in data.sets:
        name = questions.name
        for scoring in data.scorings(questions):
            records = stored_predictions(evaluation, questions, scoring)
            parts: dict[str | None, set[int] | None] = {None: None}
            parts |= {name: set(indices) for name, indices in questions.parts.items()}
            for part, within in parts.items():
                chosen = [record for record in records if within is None or record.index in within]
                for measure, values in _measures(scoring, chosen).items():
                    found.append(
                        ItemScores(
                            task=name if part is None else f"{name} ({part})",
                            measure=measure,
                            items=tuple(str(record.index) for record in chosen),
                            values=values,
                        )
                    )
    return found


def _measures(scoring: str, records: Sequence[Any]) -> dict[str, tuple[float, ...]]:
    if not records:
        return {}
    if scoring == "nll":
        return {"nll": tuple(round(record.nll_per_token, _DIGITS) for record in records)}
    modes = records[0].correct
    names = {mode: "accuracy" if mode == "choice" else f"accuracy_{mode}" for mode in modes}
    return {names[mode]: tuple(float(record.correct[mode]) for record in records) for mode in modes}
