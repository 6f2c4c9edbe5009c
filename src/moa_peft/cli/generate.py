"""`moa generate`: answers from an adapter, for one prompt, for standard input, or for a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa_peft.cli.choices import check_choice
from moa_peft.errors import UserError
from moa_peft.files import check_creatable, write_atomically

if TYPE_CHECKING:
    from moa_peft.adapter_loading import LoadedAdapter


def generate(
    adapter: Annotated[str, typer.Argument(help="Output folder of a run, or any PEFT adapter folder.")],
    prompt: Annotated[
        str | None, typer.Argument(help="The instruction. Without it: --input, or standard input.")
    ] = None,
    input: Annotated[Path | None, typer.Option(help="JSON, JSONL or Parquet file of rows, as for training.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL file for the answers (default: standard output).")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, instead of the one the adapter names.")] = None,
    template: Annotated[
        str | None, typer.Option(help="alpaca or chat; default: the one the adapter was trained with, else alpaca.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Temperature; implies --sample. Default 1.0.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling; needs --sample.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first rows of --input.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the --output file.")] = False,
) -> None:
    """Generate answers with a trained adapter.

    Decoding is greedy unless --sample or --temperature says otherwise, whatever the base model's own settings are.

    **Examples**

        moa generate runs/qwen "Tom has 3 apples and buys 4 more. How many does he have?"

        cat question.txt | moa generate runs/qwen

        moa generate runs/qwen --input test.jsonl --output answers.jsonl --batch-size 32

        moa generate runs/qwen "Write a poem." --temperature 0.7 --top-p 0.95
    """
    from moa_peft.base_models import Dtype
    from moa_peft.data import Template

    if prompt is not None and input is not None:
        raise UserError("generate: a prompt and --input are both given. Keep one.")
    if output is not None:
        _check_output(output, overwrite=overwrite)
    check_choice("--template", template, Template)
    check_choice("--dtype", dtype, Dtype)
    if sample and temperature is None:
        temperature = 1.0
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    questions = _questions(prompt, input, limit)

    from rich.console import Console

    from moa_peft.adapter_loading import load_adapter
    from moa_peft.data import end_token_ids, render_prompt
    from moa_peft.generation import generate_texts, stream_text

    loaded = load_adapter(adapter, base=base, dtype=dtype, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    chosen: Any = template or loaded.template or "alpaca"
    prompts = [render_prompt(question, loaded.tokenizer, template=chosen) for question in questions]
    settings["end_ids"] = end_token_ids(loaded.tokenizer, template=chosen)
    settings["names"] = ["the prompt" if isinstance(question, str) else question.where for question in questions]
    if input is None and output is None and sys.stdout.isatty():
        stream_text(loaded.model, loaded.tokenizer, prompts[0], **settings)
        return
    answers = generate_texts(
        loaded.model, loaded.tokenizer, prompts, batch_size=batch_size, console=Console(stderr=True), **settings
    )
    _write(answers, questions, loaded, as_rows=input is not None or output is not None, output=output)


def _check_output(file: Path, *, overwrite: bool) -> None:
    """Refuse a file that exists, or that could not be written, before the model is loaded."""
    check_creatable(file, setting="--output")
    if file.exists() and not file.is_file():
        raise UserError(
            f"--output: {str(file)!r} is no file. Give the name of a file, or leave it out for the screen."
        )
    if file.exists() and not overwrite:
        raise UserError(f"--output: {str(file)!r} exists. Give another name, or --overwrite to replace it.")
    folder = file.absolute().parent
    if not folder.is_dir():
        raise UserError(f"--output: the folder {str(folder)!r} does not exist. Create it first.")
    # The answers are written beside the file first, so replacing it takes permission in its folder.
    check_creatable(folder, setting="--output")


def _questions(prompt: str | None, file: Path | None, limit: int | None) -> list[Any]:
    from moa_peft.data.formats import check_characters

    if file is not None:
        from moa_peft.data import load_examples

        return list(load_examples(str(file), split="test", limit=limit, require_answer=False))
    text = prompt
    if text is None:
        if sys.stdin.isatty():
            raise UserError(
                'generate: no prompt. Write one: moa generate ADAPTER "...", or pipe a text, or use --input.'
            )
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"generate: standard input is not UTF-8 text ({error.reason}); convert it.") from error
    if not text.strip():
        raise UserError("generate: the prompt is empty. Write one, or use --input FILE.")
    check_characters(text, "generate: the prompt")
    return [text.strip()]


def _write(
    answers: list[str], questions: list[Any], loaded: LoadedAdapter, *, as_rows: bool, output: Path | None
) -> None:
    if not as_rows:
        typer.echo(answers[0])
        return
    rows = [_row(question, answer) for question, answer in zip(questions, answers, strict=True)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_atomically(output, text)


def _row(question: Any, answer: str) -> dict[str, Any]:
    if isinstance(question, str):
        return {"prompt": question, "generated": answer}
    reference = {} if question.reference is None else {"answer": question.reference}
    return {"prompt": question.question, **reference, "generated": answer}
