"""The quickstart: a packaged model, generated word problems, Soft MoA, and the accuracy before and after.

Everything runs through the same parts as `moa train` and `moa eval`, so what is left behind is an ordinary run:

    OUTPUT/data/{train,validation,test}.jsonl    the word problems
    OUTPUT/adapter/                              the run's folder: adapter, recipe.yaml, run.json
    OUTPUT/quickstart.json                       accuracy before and after, time, memory, versions
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moa_peft.adapter_loading import load_adapter
from moa_peft.answers import AnswerFormat
from moa_peft.base_models import PACKAGED, Dtype, load_model, load_tokenizer
from moa_peft.data import Example, load_examples
from moa_peft.environment import library_versions, peak_memory_bytes
from moa_peft.errors import UserError
from moa_peft.evaluation import Prediction, Score, answer_questions
from moa_peft.files import write_atomically
from moa_peft.intervals import Interval, paired_difference, require_scipy
from moa_peft.quickstart.base_model import gemma_terms, packaged_base_model
from moa_peft.quickstart.time_budget import (
    NUM_TIMED_STEPS,
    StopInTime,
    TimeBudget,
    fitted_steps,
)
from moa_peft.quickstart.word_problems import write_word_problems
from moa_peft.training import TrainRecipe, parse_recipe, train
from moa_peft.training.adapters import adapter_config
from moa_peft.training.step_times import NUM_UNTIMED_STEPS, StepTimer

RESULTS_FILE = "quickstart.json"
DATA_FOLDER = "data"
ADAPTER_FOLDER = "adapter"
MAX_STEPS = 300

_TEMPLATE = "alpaca"
# The longest worked answer has about 60 tokens.
_MAX_NEW_TOKENS = 70
_EVALUATION_BATCH = 64
# Loading the adapter, and the text around the scoring.
_FIXED_RESERVE_S = 35.0
# Scoring with the adapter, relative to scoring the base model: every step costs more, but answers end by themselves.
_RESERVE_FACTOR = 1.2


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """What may be chosen.

    Attributes:
        output_dir: the folder for everything that is written.
        minutes: time for the whole quickstart, the conversion of the model included.
        seed: of data, initial weights and order of rows.
        method: a name of `moa methods`.
        model: `packaged`, a folder, or a hub id.
        num_test: held-out problems to score before and after.
        overwrite: replace an earlier quickstart in `output_dir`.
    """

    output_dir: Path
    minutes: float = 10.0
    seed: int = 0
    method: str = "soft_moa"
    model: str = PACKAGED
    num_test: int = 120
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """What came out.

    Attributes:
        output_dir: the folder of the quickstart.
        adapter_dir: the folder of the run, for `moa generate`.
        before: score of the base model on the held-out problems.
        after: score with the adapter on the same problems.
        rise: strict accuracy after minus before, as a share.
        rise_interval: its 95 % interval for paired data.
        steps: optimiser steps.
        step_s: seconds of a timed step.
        total_s: seconds in all.
        peak_memory_bytes: peak resident memory of the process, None where the system does not tell.
    """

    output_dir: Path
    adapter_dir: Path
    before: Score[Prediction]
    after: Score[Prediction]
    rise: float
    rise_interval: Interval
    steps: int
    step_s: float
    total_s: float
    peak_memory_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """The content of quickstart.json, without settings and versions."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "rise": {"strict": self.rise, "interval_95": asdict(self.rise_interval)},
            "steps": self.steps,
            "timed_step_s": round(self.step_s, 3),
            "total_s": round(self.total_s, 1),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def run_quickstart(
    settings: QuickstartSettings, *, console: Console | None = None, budget: TimeBudget | None = None
) -> QuickstartResult:
    """Run the quickstart.

    Args:
        settings: what may be chosen.
        console: where progress and results go; standard error by default.
        budget: the time to keep to; default: `settings.minutes` from now.

    Raises:
        UserError: a setting is wrong, something is not installed, or the folder exists. Nothing is written then.
        TrainingInterrupted: Ctrl-C during training; the message says how to go on.
    """
    import time

    console = console or Console(stderr=True)
    budget = budget or TimeBudget(total_s=settings.minutes * 60, started_s=time.monotonic())
    recipe = quickstart_recipe(settings)
    _check(settings, recipe)
    if settings.model == PACKAGED:
        console.print(gemma_terms(), highlight=False, markup=False)
        packaged_base_model()
    tokenizer = load_tokenizer(settings.model)
    recipe = replace(recipe, options=replace(recipe.options, dtype=faster_dtype()))
    dtype = recipe.options.dtype

    folder = settings.output_dir
    _clear(folder)
    paths = write_word_problems(folder / DATA_FOLDER, seed=settings.seed)
    examples = load_examples(paths["test"], limit=settings.num_test)
    console.print(f"Word problems written to {folder / DATA_FOLDER}.", highlight=False, markup=False)

    console.print(f"Scoring the base model on {len(examples)} held-out problems.", highlight=False)
    scoring_began_s = budget.elapsed_s
    before = score_word_problems(load_model(settings.model, dtype=dtype).eval(), tokenizer, examples, console=console)
    scoring_s = budget.elapsed_s - scoring_began_s
    gc.collect()

    step_s = time_steps(recipe, budget=budget)
    reserve_s = _RESERVE_FACTOR * scoring_s + _FIXED_RESERVE_S
    steps = fitted_steps(step_s=step_s, left_s=budget.left_s(reserve_s=reserve_s), max_steps=MAX_STEPS)
    console.print(
        f"A step takes {step_s:.1f} s; {steps} steps fit into the time left. Training {settings.method} "
        f"in {str(dtype)}.",
        highlight=False,
    )
    trained = train(with_steps(recipe, steps), callbacks=[StopInTime(budget, reserve_s=reserve_s)], console=console)
    gc.collect()

    console.print(f"Scoring the adapter on the same {len(examples)} problems.", highlight=False)
    loaded = load_adapter(trained.output_dir, dtype=dtype, device="cpu")
    after = score_word_problems(loaded.model, loaded.tokenizer, examples, console=console)
    rise, interval = paired_difference(before.correct("strict"), after.correct("strict"))
    result = QuickstartResult(
        output_dir=folder,
        adapter_dir=trained.output_dir,
        before=before,
        after=after,
        rise=rise,
        rise_interval=interval,
        steps=trained.steps,
        step_s=step_s,
        total_s=budget.elapsed_s,
        peak_memory_bytes=peak_memory_bytes(),
    )
    _write(result, settings, dtype=dtype)
    return result


def samples(result: QuickstartResult, *, number: int = 2) -> list[Prediction]:
    """The first predictions of the trained model, in the order of the test set."""
    return list(result.after.predictions[:number])


def quickstart_recipe(settings: QuickstartSettings) -> TrainRecipe:
    """The recipe of the training run, for as many steps as there may be; `with_steps` fits it."""
    folder = settings.output_dir
    return parse_recipe(
        {
            "model": settings.model,
            "output_dir": str(folder / ADAPTER_FOLDER),
            "method": settings.method,
            "data": {
                "path": str(folder / DATA_FOLDER / "train.jsonl"),
                "validation_size": 0,
                "template": _TEMPLATE,
                "max_length": 512,
            },
            "max_steps": MAX_STEPS,
            # Two micro-batches: the scores over 262,144 words of all answers at once would need twice the memory.
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            # Chosen by studies/quickstart_rate.py, on training templates held out for that.
            "learning_rate": 5e-4,
            "lr_scheduler_type": "linear",
            "max_grad_norm": 1.0,
            "save_strategy": "no",
            "logging_steps": 5,
            "report_to": "none",
            "use_cpu": True,
            "seed": settings.seed,
        }
    )


def with_steps(recipe: TrainRecipe, steps: int) -> TrainRecipe:
    """The recipe for `steps` optimiser steps, a tenth of them warm-up."""
    return replace(recipe, trainer={**recipe.trainer, "max_steps": steps, "warmup_steps": max(1, steps // 10)})


def score_word_problems(model: Any, tokenizer: Any, examples: list[Example], *, console: Console) -> Score[Prediction]:
    """Answer word problems as the quickstart does, before and after training."""
    predictions = answer_questions(
        model,
        tokenizer,
        examples,
        format=AnswerFormat(kind="number"),
        template=_TEMPLATE,
        max_new_tokens=_MAX_NEW_TOKENS,
        batch_size=_EVALUATION_BATCH,
        console=console,
    )
    return Score(predictions)


def time_steps(recipe: TrainRecipe, *, budget: TimeBudget) -> float:
    """Seconds of an optimiser step, measured on a short run of the same recipe in a folder that is thrown away."""
    timer = StepTimer(clock=budget.clock)
    short = with_steps(recipe, NUM_UNTIMED_STEPS + NUM_TIMED_STEPS)
    with tempfile.TemporaryDirectory(prefix="moa-quickstart-") as folder:
        short = replace(
            short,
            options=replace(short.options, output_dir=str(Path(folder) / "timing")),
            data=replace(short.data, limit=500),
        )
        train(short, callbacks=[timer], console=Console(quiet=True))
    gc.collect()
    return timer.fastest_s


def faster_dtype() -> Dtype:
    """bfloat16 where this processor multiplies matrices faster in it than in float32, else float32.

    The difference is large in both directions: native bfloat16 instructions more than double the speed of a step,
    their emulation makes it several times slower. So it is measured, in a few hundredths of a second.
    """
    import time

    seconds: dict[Dtype, float] = {}
    names: tuple[Dtype, ...] = ("float32", "bfloat16")
    for name in names:
        left = torch.ones(1024, 640, dtype=getattr(torch, name))
        right = torch.ones(640, 2048, dtype=getattr(torch, name))
        times = []
        for _ in range(4):
            began_s = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - began_s)
        seconds[name] = min(times)
    return "bfloat16" if seconds["bfloat16"] < 0.8 * seconds["float32"] else "float32"


def _check(settings: QuickstartSettings, recipe: TrainRecipe) -> None:
    """Everything that can be wrong, before anything is converted or written."""
    if not settings.minutes > 0:
        raise UserError(f"minutes: {settings.minutes} is not allowed; give more than 0, for example 10.")
    if not 1 <= settings.num_test <= 300:
        raise UserError(f"num_test: {settings.num_test} is not allowed; give 1 to 300.")
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"seed: {settings.seed} is not allowed; give 0 to {2**32 - 1}.")
    adapter_config(recipe)
    require_scipy()
    folder = settings.output_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {str(folder)!r} is a file. Give a folder.")
    entries = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    strangers = sorted(entries - {DATA_FOLDER, ADAPTER_FOLDER, RESULTS_FILE})
    if entries and strangers:
        raise UserError(
            f"output_dir: {str(folder)!r} holds files of something else (for example {strangers[0]}).\n"
            "Give another --output_dir."
        )
    if entries and not settings.overwrite:
        raise UserError(
            f"output_dir: {str(folder)!r} holds an earlier quickstart.\n"
            "Give another --output_dir, or --overwrite to replace it."
        )


def _clear(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_FILE).unlink(missing_ok=True)
    for name in (DATA_FOLDER, ADAPTER_FOLDER):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)


def _write(result: QuickstartResult, settings: QuickstartSettings, *, dtype: Dtype) -> None:
    predictions = [
        {"before": before.to_dict(), "after": after.to_dict()}
        for before, after in zip(result.before.predictions, result.after.predictions, strict=True)
    ]
    content = {
        "settings": {**asdict(settings), "output_dir": str(settings.output_dir), "dtype": dtype},
        **result.to_dict(),
        "versions": library_versions(),
        "predictions": predictions,
    }
    write_atomically(result.output_dir / RESULTS_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
