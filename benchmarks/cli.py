"""The command line of the benchmarks."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moa_peft.errors import UserError

ALL = "all"
EXIT_USER_ERROR = 2
TABLE_WIDTH = 100

app = typer.Typer(
    name="python -m benchmarks",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_list(wanted: bool) -> None:
    """Print the benchmarks and the contenders, and stop."""
    if not wanted:
        return
    from benchmarks.contenders import CONTENDERS
    from benchmarks.suite import BENCHMARKS

    console = Console(width=TABLE_WIDTH)
    names = Table("benchmark", "measures", title="Benchmarks", title_justify="left")
    for name, benchmark in BENCHMARKS.items():
        names.add_row(name, benchmark.summary)
    methods = Table("method", "what it is", title="Contenders (--methods)", title_justify="left")
    for name, contender in CONTENDERS.items():
        methods.add_row(name, contender.summary)
    console.print(names, methods)
    console.print("end_to_end has its own contenders: " + ", ".join(BENCHMARKS["end_to_end"].allowed), highlight=False)
    raise typer.Exit


@app.command(no_args_is_help=True)
def benchmark(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A benchmark that --list names, or `all`.")],
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.", metavar="FILE")] = None,
    family: Annotated[list[str] | None, typer.Option(help="llama, qwen3 or gemma3; repeat for several.")] = None,
    methods: Annotated[str | None, typer.Option(help="Contenders, separated by commas; the anchor is added.")] = None,
    dtype: Annotated[str, typer.Option(help="Base model: float32 or bfloat16. Adapters are float32.")] = "float32",
    autocast: Annotated[bool, typer.Option(help="bfloat16 autocast around the forward pass.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int | None, typer.Option(help="Timed rounds; each benchmark has its own default.")] = None,
    warmup: Annotated[int, typer.Option(help="Rounds (end_to_end: steps) that are thrown away first.")] = 2,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens per row; in end_to_end the most a row may have.")] = 256,
    layers: Annotated[int, typer.Option(help="Decoder blocks of the random model.")] = 6,
    hidden: Annotated[int, typer.Option(help="Width of the random model.")] = 1024,
    intermediate: Annotated[int, typer.Option(help="Inner width of its MLPs.")] = 3072,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 16,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    vocabulary: Annotated[int, typer.Option(help="Tokens in the vocabulary; small, so that blocks decide.")] = 1000,
    rank: Annotated[
        int, typer.Option(help="LoRA rank of contenders without their own; parallel adapters are twice as wide.")
    ] = 8,
    active: Annotated[float, typer.Option(help="Share of tokens for which Sparse MoA keeps an expert.")] = 0.5,
    axes: Annotated[str | None, typer.Option(help="For scaling: experts,rank,tokens,layers.")] = None,
    data: Annotated[Path | None, typer.Option(help="For end_to_end: JSON rows with instruction and output.")] = None,
    model: Annotated[str, typer.Option(help="For end_to_end: packaged, a folder or a hub id.")] = "packaged",
    steps: Annotated[int, typer.Option(help="For end_to_end: timed optimiser steps.")] = 6,
    sampling: Annotated[str, typer.Option(help="For end_to_end: sequential, random, group_by_length.")] = "sequential",
    seed: Annotated[int, typer.Option(help="Of weights, batches and adapters.")] = 0,
    list_: Annotated[
        bool, typer.Option("--list", callback=show_list, is_eager=True, help="List benchmarks and contenders.")
    ] = False,
) -> None:
    """Measure what adapters cost beside the frozen base model and PEFT LoRA.

    Prints a table, and with --json writes every row with versions, machine and command. The default model is random:
    6 blocks of width 1024, MLPs of 3072, 16 heads of width 64 and 8 key-value heads; batch 4 x 256 tokens.

    **Examples**

        python -m benchmarks --list

        python -m benchmarks training_step --json step.json

        python -m benchmarks saved_bytes --family llama --family gemma3 --dtype bfloat16 --autocast

        python -m benchmarks scaling --axes experts,rank

        python -m benchmarks end_to_end --data train.json --batch 8

        python -m benchmarks all --device cuda --dtype bfloat16 --json gpu.json
    """
    from benchmarks.base import AXES, Options, Sizes

    options = Options(
        sizes=Sizes(
            hidden=hidden,
            intermediate=intermediate,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=vocabulary,
        ),
        batch=batch,
        tokens=tokens,
        dtype=dtype,  # type: ignore[arg-type]
        autocast=autocast,
        device=device,  # type: ignore[arg-type]
        methods=_words(methods),
        repeats=repeats,
        warmup=warmup,
        rank=rank,
        active_fraction=active,
        axes=_words(axes) or AXES,
        data=data,
        base_model=model,
        steps=steps,
        sampling=sampling,  # type: ignore[arg-type]
        threads=threads,
        seed=seed,
    )
    run(name, [options.changed(family=each) for each in family or ["qwen3"]], json, words=context.obj)


def run(name: str, variants: Sequence[Any], target: Path | None, *, words: Sequence[str]) -> None:
    """Run one benchmark or all of them, for each variant of the options; check everything first."""
    import torch

    from benchmarks.report import check_target, table, write_json
    from benchmarks.suite import BENCHMARKS

    messages = Console(stderr=True, width=TABLE_WIDTH)
    names = list(BENCHMARKS) if name == ALL else [name]
    if name == ALL and variants[0].data is None:
        names.remove("end_to_end")
        messages.print("end_to_end is left out: it needs --data FILE.", highlight=False)
    chosen = {each: BENCHMARKS[each]() for each in names}
    for options in variants:
        options.check()
        for benchmark in chosen.values():
            benchmark.check(options)
    if target is not None:
        check_target(target)
    if variants[0].threads is not None:
        torch.set_num_threads(variants[0].threads)
    _silence()
    rows = []
    for each, benchmark in chosen.items():
        # The random models of the families differ, the model that is trained end to end does not.
        for options in variants if each != "end_to_end" else variants[:1]:
            made = benchmark.run(options, _bar(messages))
            rows += made
            for _, part in groupby(made, key=lambda row: str(row.settings)):
                Console(width=TABLE_WIDTH).print(table(list(part)))
            if target is not None:
                # After each benchmark, so that an interrupted run keeps what it has.
                write_json(target, rows, command=shlex.join(["python", "-m", "benchmarks", *words]))


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _bar(console: Console) -> Any:
    def shown(rounds: Iterable[int], total: int, description: str) -> Iterable[int]:
        return track(rounds, total=total, description=description, console=console, disable=not console.is_terminal)

    return shown


def _silence() -> None:
    """Leave out what libraries say about models that are made, not loaded."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``python -m benchmarks``; those of the process by default.

    Returns:
        0, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(words, standalone_mode=False, obj=words)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), markup=False, highlight=False)
        return EXIT_USER_ERROR
    except typer.Abort:
        return 130
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            # A wrong option; newer typer brings its own copy of click, so the class has no fixed home.
            error.show()  # type: ignore[attr-defined]
            return error.exit_code  # type: ignore[attr-defined]
        raise
    return code if isinstance(code, int) else 0
