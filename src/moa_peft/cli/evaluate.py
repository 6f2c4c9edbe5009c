"""`moa eval`: accuracy of an adapter or a base model on sets of questions whose answers are numbers."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa_peft.errors import UserError
from moa_peft.files import check_creatable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moa_peft.data import Example
    from moa_peft.evaluation import Score
    from moa_peft.generation import LoadedAdapter
    from moa_peft.intervals import Interval

RESULTS_FILE = "results.json"
_PREDICTIONS_SUFFIX = ".predictions.jsonl"


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Adapter folder, or a base model: folder, hub id, or 'packaged'.", metavar="MODEL_OR_ADAPTER"
        ),
    ],
    data: Annotated[
        list[str], typer.Option(help="JSON, JSONL or Parquet file of questions; may be given several times.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for results.json and NAME.predictions.jsonl; default: only a table.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of every file.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 200,
    template: Annotated[
        str | None, typer.Option(help="alpaca or chat; default: the one the adapter was trained with, else alpaca.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, instead of the one the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier results in --output.")] = False,
) -> None:
    """Score questions whose answers are numbers.

    Answers are generated greedily. Strict counts only a number that the text states ("the answer is 12"); flexible
    falls back on the last number of the text. Intervals are 95 % Wilson intervals. A row without the field `answer`
    is compared with the number that its output states.

    **Examples**

        moa eval runs/qwen --data MultiArith.json --data AddSub.json --output results/qwen

        moa eval packaged --data MultiArith.json --limit 100

        moa eval Qwen/Qwen3-0.6B --data gsm8k.json --template chat --max-new-tokens 400
    """
    _check_options(template=template, dtype=dtype, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if output is not None:
        _check_output(output, overwrite=overwrite)

    from rich.console import Console

    sets = _load_sets(data, limit=limit)
    loaded, kind = _load(model, base=base, dtype=dtype, trust_remote_code=trust_remote_code)
    settings: dict[str, Any] = {
        "model": model,
        "kind": kind,
        "base": base,
        "data": dict(zip(sets, data, strict=True)),
        "limit": limit,
        "template": template or loaded.template or "alpaca",
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "decoding": "greedy",
    }
    console = Console(stderr=True)
    scores = _score_sets(loaded, sets, settings, console)
    Console().print(_table(scores, title=model))
    if output is not None:
        _write(output, settings, scores)
        console.print(f"Saved in {output}.", highlight=False, markup=False)


def _check_options(*, template: str | None, dtype: str, batch_size: int, max_new_tokens: int) -> None:
    choices = {
        "--template": (template, ("alpaca", "chat")),
        "--dtype": (dtype, ("auto", "float32", "bfloat16", "float16")),
    }
    for name, (value, allowed) in choices.items():
        if value is not None and value not in allowed:
            raise UserError(f"{name}: {value!r} is not allowed; give one of {', '.join(allowed)}.")
    for name, number in (("--batch-size", batch_size), ("--max-new-tokens", max_new_tokens)):
        if number < 1:
            raise UserError(f"{name}: {number} is not allowed; give at least 1.")


def _check_output(folder: Path, *, overwrite: bool) -> None:
    """Refuse to touch what exists, unless it is an earlier evaluation and may be replaced."""
    check_creatable(folder, setting="--output")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {str(folder)!r} is a file. Give a folder.")
    check_creatable(folder.resolve().parent, setting="--output")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"--output: {str(folder)!r} exists and is not empty. Give another folder, or --overwrite to replace it."
        )
    strangers = [
        file.name
        for file in folder.iterdir()
        if file.name != RESULTS_FILE and not file.name.endswith(_PREDICTIONS_SUFFIX)
    ]
    if strangers:
        raise UserError(
            f"--overwrite: {str(folder)!r} holds more than results of `moa eval` (for example {strangers[0]}), so it "
            "will not be deleted.\nGive another folder, or empty that one yourself."
        )


def _load_sets(files: list[str], *, limit: int | None) -> dict[str, list[Example]]:
    """The questions of every file, by a name of its own: the file's, with its folder where two are called the same."""
    from moa_peft.data import load_examples
    from moa_peft.evaluation import numeric_references

    stems = [Path(file).stem for file in files]
    names = [
        stem if stems.count(stem) == 1 else f"{Path(file).absolute().parent.name}-{stem}"
        for file, stem in zip(files, stems, strict=True)
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--data: two files would both be called {twice!r}. Rename one, or score them separately.")
    sets = {}
    for name, file in zip(names, files, strict=True):
        sets[name] = load_examples(file, split="test", limit=limit, require_answer=False)
        numeric_references(sets[name])
    return sets


def _load(model: str, *, base: str | None, dtype: str, trust_remote_code: bool) -> tuple[LoadedAdapter, str]:
    """The model with its tokenizer, and whether it is an adapter or a base model."""
    import torch

    from moa_peft.base_models import load_model, load_tokenizer
    from moa_peft.generation import LoadedAdapter, load_adapter

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if (Path(model).expanduser() / "adapter_config.json").is_file():
        return load_adapter(model, base=base, **options), "adapter"
    if base is not None:
        raise UserError(f"--base: {model!r} is no adapter folder (no adapter_config.json), so it has no base model.")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    plain: Any = load_model(model, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedAdapter(model=plain.to(device).eval(), tokenizer=tokenizer, template=None), "base model"


def _score_sets(
    loaded: LoadedAdapter, sets: dict[str, list[Example]], settings: dict[str, Any], console: Console
) -> dict[str, Score]:
    from moa_peft.evaluation import check_lengths, score_numeric

    options = {name: settings[name] for name in ("template", "max_new_tokens")}
    for examples in sets.values():
        check_lengths(loaded.model, loaded.tokenizer, examples, **options)
    scores: dict[str, Score] = {}
    for name, examples in sets.items():
        console.print(f"{name}: {len(examples):,} questions", highlight=False, markup=False)
        scores[name] = score_numeric(
            loaded.model,
            loaded.tokenizer,
            examples,
            **options,
            batch_size=settings["batch_size"],
            console=console,
        )
    return scores


def _table(scores: dict[str, Score], *, title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("set", title=escape(title))
    for column in ("items", "strict %", "95 % interval", "flexible %", "missing"):
        table.add_column(column, justify="right")
    for name, score in scores.items():
        table.add_row(
            escape(name),
            f"{score.num_items:,}",
            f"{100 * score.accuracy_strict:.1f}",
            format_interval(score.interval_strict),
            f"{100 * score.accuracy_flexible:.1f}",
            f"{score.missing_strict:,}",
        )
    return table


def format_interval(interval: Interval) -> str:
    """`3.1 to 12.5`, in percent or points."""
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _write(folder: Path, settings: dict[str, Any], scores: dict[str, Score]) -> None:
    """Write everything into a folder beside, then rename it into place."""
    from moa_peft.environment import library_versions

    results = {
        "command": shlex.join(["moa", *sys.argv[1:]]),
        "settings": settings,
        "versions": library_versions(),
        "scores": {name: score.to_dict() for name, score in scores.items()},
    }
    # A link to a folder stays a link: what it points to is replaced.
    folder = folder.resolve()
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    staging.mkdir(parents=True)
    try:
        for name, score in scores.items():
            lines = [json.dumps(prediction.to_dict(), ensure_ascii=False) for prediction in score.predictions]
            (staging / f"{name}{_PREDICTIONS_SUFFIX}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (staging / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
