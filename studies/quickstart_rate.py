"""The learning rate of `moa quickstart`, chosen without its test templates.

Every third training template is held out for development, with problems over the numbers of the validation split:
as in the quickstart itself, neither the story nor the numbers occur in a training row. For each rate the quickstart's
own recipe trains on the other templates, from the same weights and on the same rows. The lowest development loss
wins; the strict accuracy on a few of the problems is there to be read, not to choose.

    python -m studies.quickstart_rate

The result is written after every rate, and a rate that is in it is skipped, so an interrupted study goes on where it
was. One seed, and fewer steps than a quickstart on idle cores takes: it tells apart rates that differ by a factor.
The rates began at 5e-4; half of that was added because the lowest rate had come out best.
"""

from __future__ import annotations

import gc
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from moa_peft.adapter_loading import LoadedAdapter, load_adapter
from moa_peft.base_models import PACKAGED, pad_token_id
from moa_peft.data import CompletionCollator, Example, load_examples, tokenize_examples
from moa_peft.environment import library_versions
from moa_peft.errors import UserError
from moa_peft.files import write_atomically
from moa_peft.quickstart.run import (
    QuickstartSettings,
    faster_dtype,
    quickstart_recipe,
    score_word_problems,
    with_steps,
)
from moa_peft.quickstart.templates import Template
from moa_peft.quickstart.word_problems import TRAIN_TEMPLATES, generate_word_problems, write_rows
from moa_peft.training import TrainRecipe, train
from moa_peft.training.labelled_positions import only_labelled_positions

DEVELOPMENT_TEMPLATES = TRAIN_TEMPLATES[2::3]
KEPT_TEMPLATES = tuple(template for template in TRAIN_TEMPLATES if template not in DEVELOPMENT_TEMPLATES)
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)

_LOSS_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Study:
    """What makes two results comparable.

    Attributes:
        steps: optimiser steps of every run; the schedule ends with them.
        seed: of data, initial weights and order of rows.
        model: `packaged`, a folder, or a hub id.
        method: a name of `moa methods`.
        num_train: rows to train on.
        num_loss: development problems for the loss.
        num_scored: development problems that are also answered, the first of them.
    """

    steps: int = 40
    seed: int = 0
    model: str = PACKAGED
    method: str = "soft_moa"
    num_train: int = 4000
    num_loss: int = 10 * len(DEVELOPMENT_TEMPLATES)
    num_scored: int = 2 * len(DEVELOPMENT_TEMPLATES)


def run_study(study: Study, *, rates: Sequence[float], output: Path, command: str, console: Console) -> dict[str, Any]:
    """Train and measure every rate that `output` does not hold yet.

    Args:
        study: what all rates share.
        rates: learning rates.
        output: the result file; its folder exists.
        command: what to put down as the way to repeat this.
        console: where progress goes.

    Returns:
        The content of `output`.

    Raises:
        UserError: `output` holds a study of another kind.
    """
    result = _earlier(output, study) or {
        "command": command,
        "study": asdict(study),
        "development_templates": _keys(DEVELOPMENT_TEMPLATES),
        "training_templates": _keys(KEPT_TEMPLATES),
        "versions": library_versions(),
        "rates": [],
    }
    for rate in rates:
        if rate in [done["learning_rate"] for done in result["rates"]]:
            console.print(f"Learning rate {rate:g} is in {output}.", highlight=False)
            continue
        console.print(f"Learning rate {rate:g}: {study.steps} steps.", highlight=False)
        measured = [*result["rates"], measure(study, learning_rate=rate, console=console)]
        result["rates"] = sorted(measured, key=lambda done: done["learning_rate"])
        result["chosen"] = min(measured, key=lambda done: done["development_loss"])["learning_rate"]
        write_atomically(output, json.dumps(result, indent=2) + "\n")
    return result


def measure(study: Study, *, learning_rate: float, console: Console) -> dict[str, Any]:
    """Train with one rate in a folder that is thrown away, and measure on the development problems."""
    dtype = faster_dtype()
    with tempfile.TemporaryDirectory(prefix="moa-study-") as folder:
        recipe = _recipe(study, Path(folder), learning_rate=learning_rate)
        recipe = replace(recipe, options=replace(recipe.options, dtype=dtype))
        development = _write_data(study, Path(recipe.data.path))
        trained = train(recipe, console=console)
        gc.collect()
        loaded = load_adapter(trained.output_dir, dtype=dtype, device="cpu")
    began_s = time.monotonic()
    loss = development_loss(loaded, development, recipe)
    score = score_word_problems(loaded.model, loaded.tokenizer, development[: study.num_scored], console=console)
    gc.collect()
    console.print(
        f"Development loss {loss:.4f}, strict {score.accuracy('strict').correct} of {score.num_items}.",
        highlight=False,
    )
    return {
        "learning_rate": learning_rate,
        "development_loss": loss,
        "development_score": score.to_dict(),
        "last_train_loss": trained.train_loss,
        "steps": trained.steps,
        "dtype": dtype,
        "train_s": trained.train_s,
        "measure_s": round(time.monotonic() - began_s, 1),
    }


@torch.no_grad()
def development_loss(loaded: LoadedAdapter, examples: Sequence[Example], recipe: TrainRecipe) -> float:
    """Mean cross entropy over the answer tokens of all examples, in nats per token."""
    rows, _ = tokenize_examples(
        examples, loaded.tokenizer, template=recipe.data.template, max_length=recipe.data.max_length
    )
    collate = CompletionCollator(pad_token_id(loaded.tokenizer))
    loss_sum, count = 0.0, 0
    for start in range(0, len(rows), _LOSS_BATCH):
        batch = collate([rows[index] for index in range(start, min(start + _LOSS_BATCH, len(rows)))])
        labels_BT = batch.pop("labels")
        with only_labelled_positions(loaded.model.get_output_embeddings(), labels_BT) as positions:
            logits = loaded.model(**batch).logits
        loss_sum += positions.loss_sum(logits).item()
        count += positions.targets_N.numel()
    return loss_sum / count


def _recipe(study: Study, folder: Path, *, learning_rate: float) -> TrainRecipe:
    settings = QuickstartSettings(output_dir=folder, seed=study.seed, method=study.method, model=study.model)
    recipe = with_steps(quickstart_recipe(settings), study.steps)
    return replace(recipe, trainer={**recipe.trainer, "learning_rate": learning_rate})


def _write_data(study: Study, train_file: Path) -> list[Example]:
    """Write the training rows to `train_file`, and return the development problems."""
    rows = generate_word_problems("train", num_rows=study.num_train, seed=study.seed, templates=KEPT_TEMPLATES)
    development = generate_word_problems(
        "validation", num_rows=study.num_loss, seed=study.seed, templates=DEVELOPMENT_TEMPLATES
    )
    train_file.parent.mkdir()
    write_rows(train_file, rows)
    write_rows(train_file.with_name("development.jsonl"), development)
    return load_examples(train_file.with_name("development.jsonl"))


def _earlier(output: Path, study: Study) -> dict[str, Any] | None:
    if not output.exists():
        return None
    result = json.loads(output.read_text(encoding="utf-8"))
    same_templates = result["development_templates"] == _keys(DEVELOPMENT_TEMPLATES)
    if result["study"] != asdict(study) or not same_templates:
        raise UserError(
            f"output: {str(output)!r} holds a study with other settings or templates: {result['study']}.\n"
            "Give another --output, or remove the file."
        )
    return result


def _keys(templates: Sequence[Template]) -> list[str]:
    return [template.key for template in templates]


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps of every run.")] = Study.steps,
    seed: Annotated[int, typer.Option(help="Seed of data, weights and order.")] = Study.seed,
    model: Annotated[str, typer.Option(help="'packaged', a model folder, or a hub id.")] = Study.model,
    rate: Annotated[list[float] | None, typer.Option(help=f"Repeat for several; default {RATES}.")] = None,
    output: Annotated[Path, typer.Option(help="Result file.")] = Path("docs/results/quickstart_rate.json"),
) -> None:
    """Compare learning rates of the quickstart on held-out training templates."""
    command = shlex.join(["python", "-m", "studies.quickstart_rate", *sys.argv[1:]])
    study = Study(steps=steps, seed=seed, model=model)
    try:
        result = run_study(study, rates=rate or RATES, output=output, command=command, console=Console(stderr=True))
    except UserError as error:
        raise SystemExit(str(error)) from error
    print(f"Chosen: {result['chosen']:g}")


if __name__ == "__main__":
    typer.run(main)
