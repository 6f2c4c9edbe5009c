"""`moa count`: trainable parameters of a method on a model, from configurations alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moa_peft.errors import UserError


def count(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Model folder, config.json, hub id, or 'packaged'; no weights are read.")],
    method: Annotated[str, typer.Option(help="A name that `moa methods` lists.")] = "soft_moa",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Count trainable parameters per expert type and router.

    Any knob of the method can be given as an option.

    **Examples**

        moa count --model Qwen/Qwen3-8B

        moa count --model ./my-model --method sparse_moa --rank 16 --hidden_per_expert 0

        moa count --model config.json --method lora --json
    """
    from moa_peft.base_models import load_config
    from moa_peft.counting import count_parameters
    from moa_peft.methods import method_config

    config = method_config(method, **{"task_type": "CAUSAL_LM"} | _knobs(context.args))
    counted = count_parameters(load_config(model), config)
    if as_json:
        typer.echo(json.dumps({"model": model, "method": method, **counted.to_dict()}, indent=2))
        return
    table = Table("part", "type", title=f"{method} on {model}", show_footer=False)
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    experts = _without_numbers(counted.experts)
    rows: list[tuple[str, str, int]] = [(name, "expert", number) for name, number in experts.items()]
    table_rows = rows + [("router", "router", counted.router), ("threshold", "router", counted.threshold)]
    table_rows += [("other", "PEFT", counted.other)]
    for name, kind, number in table_rows:
        if number:
            table.add_row(name, kind, f"{number:,}", f"{number / counted.total:.1%}")
    table.add_section()
    for name, number in counted.types.items():
        table.add_row(f"all {name}", "expert type", f"{number:,}", f"{number / counted.total:.1%}")
    table.add_section()
    table.add_row("total", "", f"{counted.total:,}", f"{counted.total / counted.base:.3%} of the base")
    Console().print(table)


def _without_numbers(experts: Mapping[str, int]) -> dict[str, int]:
    """Copies of one expert (``lora_q_0``, ``lora_q_1``, ...) as one entry (``lora_q, 2 copies``)."""
    copies = Counter(_stem(name, experts) for name in experts)
    joined: dict[str, int] = Counter()
    for name, number in experts.items():
        stem = _stem(name, experts)
        joined[stem if copies[stem] == 1 else f"{stem}, {copies[stem]} copies"] += number
    return joined


def _stem(name: str, experts: Mapping[str, int]) -> str:
    stem, _, number = name.rpartition("_")
    return stem if number.isdigit() and f"{stem}_0" in experts else name


def _knobs(words: list[str]) -> dict[str, Any]:
    """``--name value`` and ``--name=value`` pairs, values as YAML."""
    import yaml

    knobs: dict[str, Any] = {}
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise UserError(f"count: unexpected {name!r}. Knobs are given as --name value; `moa methods --knobs`.")
        if not equals:
            if not rest:
                raise UserError(f"count: {name} needs a value.")
            value = rest.pop(0)
        try:
            knobs[name.removeprefix("--").replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"count: the value of {name} is no valid YAML: {value!r}") from error
    return knobs
