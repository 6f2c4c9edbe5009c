"""Every method trains, saves, reloads and generates: its small recipe for 30 steps on real rows.

    python -m studies.method_runs --data data/math

It shows that the methods work on a real model, and compares nothing: 30 steps, one seed, no tuning. Every method runs
in processes of its own, `moa train recipes/small/METHOD.yaml ...` and then `moa generate RUN ...`. The result file is
written after each, and a method that is in it is not run again.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moa_peft.environment import library_versions
from moa_peft.errors import UserError
from moa_peft.files import write_atomically
from moa_peft.methods import METHODS

STEPS = 30
WINDOW = 8
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does he have?"
SETTINGS = {
    "max_steps": STEPS,
    "warmup_steps": 3,
    "logging_steps": 1,
    "save_steps": STEPS,
    "per_device_train_batch_size": 2,
    "data.validation_size": 16,
    "dtype": "bfloat16",
}
_SHOWN_OUTPUT = 2000


def run_method(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """Train one method, and generate with what it saved.

    Args:
        name: a key of `METHODS`.
        data: folder with ``train.json``.
        folder: where the run may write.

    Returns:
        Mean training loss of the first and of the last steps, validation loss, seconds, and a generated text.

    Raises:
        RuntimeError: if a command fails, with the end of what it printed.
    """
    run = folder / name
    words = ["train", f"recipes/small/{name}.yaml", "--data.path", str(data / "train.json"), "--output_dir", str(run)]
    for key, value in SETTINGS.items():
        words += [f"--{key}", str(value)]
    _moa(words)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
    auxiliary = sorted({key for entry in record["log"] for key in entry if key.startswith("moa/")})
    return {
        "method": name,
        "steps": record["results"]["steps"],
        "first_loss": statistics.mean(losses[:WINDOW]),
        "last_loss": statistics.mean(losses[-WINDOW:]),
        "validation_loss": record["results"]["validation_loss"],
        "logged_losses": auxiliary,
        "generated": _moa(["generate", str(run), QUESTION, "--max-new-tokens", "16"]).strip(),
    }


def _moa(words: list[str]) -> str:
    done = subprocess.run([sys.executable, "-m", "moa_peft", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        output = (done.stdout + done.stderr)[-_SHOWN_OUTPUT:]
        raise RuntimeError(f"moa {shlex.join(words)} ended with {done.returncode}:\n{output}")
    return done.stdout


def main(
    data: Annotated[Path, typer.Option(help="Folder with train.json: rows with instruction, input and output.")],
    output: Annotated[Path, typer.Option(help="Result file.")] = Path("docs/results/methods/runs.json"),
    methods: Annotated[str, typer.Option(help="Comma-separated names; all by default.")] = ",".join(METHODS),
) -> None:
    """Train every method for 30 steps, reload it, generate."""
    names = methods.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown or not (data / "train.json").is_file():
        raise UserError(f"--methods {unknown} or --data {data}: unknown method, or no train.json in the folder.")
    result: dict[str, Any] = {"runs": []}
    if output.exists():
        result = json.loads(output.read_text(encoding="utf-8"))
    done = {run["method"] for run in result["runs"]}
    result |= {
        "command": "python -m studies.method_runs --data data/math",
        "settings": SETTINGS,
        "window": WINDOW,
        "versions": library_versions(),
    }
    console = Console()
    for name in track([name for name in names if name not in done], "methods", console=console):
        with tempfile.TemporaryDirectory(prefix="moa_methods_") as folder:
            result["runs"].append(run_method(name, data, Path(folder)))
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, json.dumps(result, indent=2) + "\n")
    table = Table("method", "first steps", "last steps", "validation", title=f"loss, {STEPS} steps of 2 rows")
    for run in result["runs"]:
        numbers = [f"{run[key]:.3f}" for key in ("first_loss", "last_loss", "validation_loss")]
        table.add_row(run["method"], *numbers)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
