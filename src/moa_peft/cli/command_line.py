"""The command that is running, as result files record it."""

from __future__ import annotations

import shlex
import sys

import typer


def command_line(context: typer.Context) -> str:
    """The words after `moa`, quoted for a shell: those that `main` was given, else those of the process."""
    words = context.obj if isinstance(context.obj, list) else sys.argv[1:]
    return shlex.join(["moa", *words])
