"""The `moa` command: one module per command, listed here; user errors become one screen of text and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from moa_peft.cli.compare import compare
from moa_peft.cli.count import count
from moa_peft.cli.evaluate import evaluate
from moa_peft.cli.execute import execute
from moa_peft.cli.generate import generate
from moa_peft.cli.methods import methods
from moa_peft.cli.quickstart import quickstart
from moa_peft.cli.train import train
from moa_peft.errors import UserError
from moa_peft.files import is_disk_full
from moa_peft.version import __version__

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="moa",
    help="Fine-tune language models with a mixture of adapters (LoRA, parallel adapter and prompt experts).",
    epilog="Every command explains itself: `moa train --help`. After an error, --traceback shows where it came from.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Options that this command does not know are recipe keys.
_ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}
# Everything after the program's name belongs to the program, its --help too.
_ANY_WORD = {"allow_interspersed_args": False, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}

app.command(context_settings=_ANY_OPTION)(train)
app.command()(quickstart)
app.command()(generate)
app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(methods)
app.command(context_settings=_ANY_OPTION)(count)
app.command(name="exec", context_settings=_ANY_WORD)(execute)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moa-peft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show Python's traceback after an error (or set MOA_TRACEBACK=1).")
    ] = False,
) -> None:
    """Fine-tune language models with a mixture of adapters (LoRA, parallel adapter and prompt experts)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `moa`; those of the process by default.

    Returns:
        The exit code: 0, 2 for a mistake of the user (a full disk included), 128 + n after signal n.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback, words = _take_traceback(words)
    if not show_traceback:
        # Deprecations inside these libraries are nothing the user of a command can act on.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|torch)\b")
    try:
        code = app(words, standalone_mode=False, obj=words)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            # A wrong option or command; newer typer brings its own copy of click, so the class has no fixed home.
            error.show()  # type: ignore[attr-defined]
            return error.exit_code  # type: ignore[attr-defined]
        signal_number = getattr(error, "signal_number", None)
        interrupted = isinstance(error, typer.Abort) or signal_number is not None
        message = (str(error) or "Interrupted.") if interrupted else _message(error)
        if message is None or show_traceback:
            raise
        _print_error(message, title="Stopped" if interrupted else "Error")
        if not interrupted:
            return EXIT_USER_ERROR
        return EXIT_INTERRUPTED if signal_number is None else 128 + signal_number
    return code if isinstance(code, int) else 0


def _message(error: Exception) -> str | None:
    """What to show instead of a traceback; None for errors that are not the user's."""
    if isinstance(error, UserError):
        return str(error)
    if is_disk_full(error):
        return f"The disk is full: {error}\nFree some space, or choose another output_dir, and run the command again."
    if isinstance(error, PermissionError):
        return f"No permission: {error}\nChoose another file or folder, or change its permissions."
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError):
        return f"The file system refused: {error}\nCheck the path: a part of it is missing, or is no folder."
    if isinstance(error, OSError) and error.filename is not None:
        return f"The file system refused: {error}\nChoose another file or folder."
    return None


def _take_traceback(words: list[str]) -> tuple[bool, list[str]]:
    """Accept --traceback anywhere before `--` or the program of `moa exec`, not only before the command."""
    wanted = os.environ.get("MOA_TRACEBACK", "") not in ("", "0")
    if "exec" in words[:2]:
        return wanted or "--traceback" in words[: words.index("exec")], words
    return wanted or "--traceback" in words, [word for word in words if word != "--traceback"]


def _print_error(message: str, *, title: str = "Error") -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"[bold red]{title}[/bold red]")
    console.print(message, markup=False, highlight=False)
