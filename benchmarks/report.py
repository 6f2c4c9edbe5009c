"""Rows as a table for people and as JSON for programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.rows import Row
from moa_peft.environment import library_versions
from moa_peft.errors import UserError
from moa_peft.files import write_atomically

_SCALES = {"s": (1e3, "ms"), "B": (2.0**-20, "MiB"), "FLOP": (1e-9, "GFLOP")}


def table(rows: Sequence[Row]) -> Table:
    """One benchmark on one model. A measurement with several anchors takes one line for each.

    Args:
        rows: of the same benchmark, model and settings.
    """
    first = rows[0]
    settings = first.settings
    title = f"{first.benchmark}, {first.model}, {settings['batch']} x {settings['tokens']} tokens, {settings['dtype']}"
    made = Table(title=title + (", autocast" if settings["autocast"] else ""), title_justify="left")
    made.add_column("method", no_wrap=True)
    made.add_column("metric", no_wrap=True)
    made.add_column("value", justify="right", no_wrap=True)
    made.add_column("over", no_wrap=True)
    made.add_column("ratio", justify="right", no_wrap=True)
    made.add_column("quartiles", justify="right", no_wrap=True)
    last = ("", "")
    for row in rows:
        again = (row.method, row.metric) == last
        if last[1] and row.metric != last[1]:
            made.add_section()
        last = (row.method, row.metric)
        head = ("", "", "") if again else (row.method, row.metric, format_value(row))
        spread = "" if row.ratio_q1 is None else f"{row.ratio_q1:.3f}-{row.ratio_q3:.3f}"
        made.add_row(*head, row.baseline, f"{row.ratio:.3f}", spread)
    return made


def format_value(row: Row) -> str:
    """A value in a unit that people read."""
    factor, unit = _SCALES.get(row.unit, (1.0, row.unit))
    return f"{row.value * factor:,.2f} {unit}".rstrip()


def check_target(path: Path) -> None:
    """Refuse a result file that cannot be written, before hours are spent on what goes into it.

    Raises:
        UserError: its folder does not exist, or it is a folder itself.
    """
    if path.is_dir():
        raise UserError(f"--json: {path} is a folder. Give the name of a file.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder {path.parent}. Create it first, or give another place.")


def write_json(path: Path, rows: Sequence[Row], *, command: str) -> None:
    """Write the rows, and what they depend on.

    Args:
        path: the file; it is replaced.
        rows: all rows of the run.
        command: the command line that made them.
    """
    content: dict[str, Any] = {
        "command": command,
        "versions": library_versions(),
        "machine": describe_machine(),
        "rows": [row.to_dict() for row in rows],
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")
