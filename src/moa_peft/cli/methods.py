"""`moa methods`: the named methods, with formula, paper, scope, knobs and, for a given model, trainable parameters."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from moa_peft.errors import UserError

if TYPE_CHECKING:
    from moa_peft.methods import Method

WIDTH = 100
"""Of the table where the output is no terminal."""


def methods(
    model: Annotated[
        str | None, typer.Option(help="Model folder, config.json or hub id: adds each method's trainable parameters.")
    ] = None,
    knobs: Annotated[bool, typer.Option("--knobs", help="Show each method's knobs and their defaults.")] = False,
) -> None:
    """List the methods a recipe can name.

    **Examples**

        moa methods

        moa methods --knobs

        moa methods --model Qwen/Qwen3-8B
    """
    from moa_peft.base_models import load_config
    from moa_peft.methods import METHODS

    config = None if model is None else load_config(model)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table()
    table.add_column("method", no_wrap=True)
    table.add_column("what it makes of the model")
    table.add_column("arXiv", no_wrap=True)
    table.add_column("scope", no_wrap=True)
    refused = {}
    if config is not None:
        table.add_column("trainable", justify="right", no_wrap=True)
    wanted = track(METHODS.values(), "Counting", console=Console(stderr=True), transient=True, disable=config is None)
    for method in wanted:
        row = [method.name, escape(method.formula), method.source.removeprefix("arXiv "), method.scope]
        if config is not None:
            number = _trainable(config, method)
            if isinstance(number, UserError):
                refused[method.name] = number
            row.append("-" if isinstance(number, UserError) else f"{number:,}")
        table.add_row(*row)
    console.print(table)
    for name, reason in refused.items():
        console.print(f"{name}: {reason}", highlight=False, markup=False)
    if knobs:
        _print_knobs(console)


def _trainable(config: Any, method: Method) -> int | UserError:
    """Parameters of a method with its defaults, or why it does not fit the model."""
    from moa_peft.counting import count_parameters

    with warnings.catch_warnings():
        # What experts a family lacks is for `moa count`; here it would be said once per method.
        warnings.simplefilter("ignore")
        try:
            return count_parameters(config, method.build(task_type="CAUSAL_LM")).total
        except UserError as error:
            return error


def _print_knobs(console: Console) -> None:
    from moa_peft.methods import METHODS

    for method in METHODS.values():
        console.print(f"\n[bold]{method.name}[/bold]", highlight=False)
        for knob, default in method.knobs.items():
            console.print(f"  {knob} = {default!r}", highlight=False, markup=False)
    console.print(
        "\nBeside its knobs a method takes any field of its configuration: of MoAConfig (router and losses take the "
        "place of the method's own), and lora those of PEFT's LoraConfig.",
        highlight=False,
    )
