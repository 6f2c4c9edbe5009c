"""`moa methods`: the named methods, with formula, paper, knobs and, for a given model, trainable parameters."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


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
    from moa_peft.counting import count_parameters
    from moa_peft.methods import METHODS

    config = None if model is None else load_config(model)
    table = Table("method", "adds to the base model", "paper", "scope")
    if config is not None:
        table.add_column("trainable", justify="right")
    for name, method in METHODS.items():
        row = [name, escape(method.formula), method.source, method.scope]
        if config is not None:
            row.append(f"{count_parameters(config, method.build(task_type='CAUSAL_LM')).total:,}")
        table.add_row(*row)
    console = Console()
    console.print(table)
    if knobs:
        for name, method in METHODS.items():
            console.print(f"\n[bold]{name}[/bold]", highlight=False)
            for knob, default in method.knobs.items():
                console.print(f"  {knob} = {default!r}", highlight=False)
