"""`moa quickstart`: the embedded default, from nothing to a trained adapter in ten minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from moa_peft.evaluation import Prediction, Score
    from moa_peft.quickstart.run import QuickstartResult


def quickstart(
    output_dir: Annotated[
        Path, typer.Option("--output_dir", "--output-dir", help="Folder for data, adapter and results.")
    ] = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(help="Time for everything; the training steps are fitted to it.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Seed of data, weights and order.")] = 0,
    method: Annotated[str, typer.Option(help="Any method of `moa methods`.")] = "soft_moa",
    model: Annotated[str, typer.Option(help="'packaged' (Gemma 3 270M), a model folder, or a hub id.")] = "packaged",
    num_test: Annotated[
        int, typer.Option("--num_test", "--num-test", help="Held-out problems scored before and after.")
    ] = 120,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier quickstart.")] = False,
) -> None:
    """Train a first adapter on word problems, without account, hub or own data, in ten minutes on two CPU cores.

    Prepares the packaged Gemma 3 270M (once), writes word problems, measures the accuracy on problems of kinds that
    training does not see, trains Soft MoA for as many steps as fit into the time, and measures again.

    **Examples**

        moa quickstart

        moa quickstart --minutes 20 --seed 1 --output_dir runs/quickstart_seed1

        moa quickstart --method sparse_moa --output_dir runs/quickstart_sparse
    """
    # Importing torch and transformers takes seconds, which count too.
    started_s = time.monotonic()

    from rich.console import Console

    from moa_peft.quickstart.run import QuickstartSettings, run_quickstart
    from moa_peft.quickstart.time_budget import TimeBudget

    settings = QuickstartSettings(
        output_dir=output_dir,
        minutes=minutes,
        seed=seed,
        method=method,
        model=model,
        num_test=num_test,
        overwrite=overwrite,
    )
    budget = TimeBudget(total_s=minutes * 60, started_s=started_s)
    _report(run_quickstart(settings, console=Console(stderr=True), budget=budget), Console())


def _report(result: QuickstartResult, console: Console) -> None:
    """Accuracy, two samples, where everything is, and what to try next."""
    from rich.table import Table

    from moa_peft.cli.score_tables import format_interval
    from moa_peft.quickstart.run import RESULTS_FILE, samples

    table = Table("held-out word problems", title="Strict accuracy (the answer must be stated)")
    for column in ("correct", "%", "95 % interval", "flexible %", "missing"):
        table.add_column(column, justify="right")
    table.add_row("before", *_cells(result.before))
    table.add_row("after", *_cells(result.after))
    console.print(table)
    console.print(
        f"Rise: {100 * result.rise:+.1f} points (95 % interval {format_interval(result.rise_interval)}, paired), "
        f"after {result.steps} steps.",
        highlight=False,
    )
    for sample in samples(result):
        _print_sample(sample, console)
    memory = result.peak_memory_bytes
    peak = "" if memory is None else f", {memory / 2**30:.1f} GiB peak memory"
    lines = [
        f"\nDone in {result.total_s / 60:.1f} minutes{peak}.",
        f"Adapter: {result.adapter_dir}",
        f"Results: {result.output_dir / RESULTS_FILE}",
        "Next:",
        f'  moa generate {result.adapter_dir} "A box holds 12 pencils. How many pencils are in 4 boxes?"',
        "  moa train recipes/small/soft_moa.yaml --data.path YOUR_DATA.json",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _cells(score: Score) -> list[str]:
    from moa_peft.cli.score_tables import format_interval

    strict, flexible = score.accuracy("strict"), score.accuracy("flexible")
    return [
        f"{strict.correct}/{score.num_items}",
        f"{100 * strict.value:.1f}",
        format_interval(strict.interval),
        f"{100 * flexible.value:.1f}",
        str(strict.missing),
    ]


def _print_sample(sample: Prediction, console: Console) -> None:
    verdict = "right" if sample.correct["strict"] else f"wrong, it is {sample.reference}"
    console.print(f"\nQuestion: {sample.question}", highlight=False, markup=False)
    console.print(f"Answer:   {sample.output.strip()}  ({verdict})", highlight=False, markup=False)
