"""`moa eval`: scores of an adapter or a base model on question sets, programs, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa_peft.cli.choices import check_choice, split_words
from moa_peft.cli.command_line import command_line
from moa_peft.errors import UserError

if TYPE_CHECKING:
    from moa_peft.adapter_loading import LoadedAdapter
    from moa_peft.evaluation.folder import EvaluationFolder
    from moa_peft.evaluation.question_sets import QuestionSet
    from moa_peft.evaluation.run import ScoringSettings


def evaluate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Adapter folder, or a base model: folder, hub id, or 'packaged'.", metavar="MODEL_OR_ADAPTER"
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Question sets and suites, comma-separated: math, commonsense, code, AddSub, boolq, humaneval, ..."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Folder or hub id of the tasks (default: MOA_DATA); without --tasks, files of questions."),
    ] = None,
    scoring: Annotated[
        str,
        typer.Option(help="Comma-separated: generate, loglikelihood (of the options), nll (of reference answers)."),
    ] = "generate",
    legacy: Annotated[
        bool, typer.Option("--legacy", help="Also read answers as the reference implementation does.")
    ] = False,
    train: Annotated[
        str | None, typer.Option(help="Training rows; questions that occur there with other numbers are shown apart.")
    ] = None,
    harness: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, comma-separated.")] = None,
    execute_code: Annotated[
        bool, typer.Option("--execute-code", help="Run what the model writes for humaneval and mbpp, in a sandbox.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Programs for each problem of humaneval and mbpp.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="Of sampled programs; default: 0.7 for several.")] = None,
    pass_at: Annotated[str, typer.Option(help="Which pass@k, comma-separated; each at most --samples.")] = "1",
    include_path: Annotated[str | None, typer.Option(help="Folder with further harness tasks.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Worked examples in a harness task's prompt.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for results and predictions; one that exists is continued. Default: a table only."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of every set.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens; default: by task.")] = None,
    template: Annotated[
        str | None, typer.Option(help="alpaca or chat; default: the one the adapter was trained with, else alpaca.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, instead of the one the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[str, typer.Option(help="Of the base model: none, 8bit or 4bit.")] = "none",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier results in --output.")] = False,
) -> None:
    """Score a model on question sets.

    **generate**: answers are generated greedily, whatever the model's own settings say. Strict counts only an answer
    that the text states ("the answer is 12"); flexible falls back on the last number, letter or label.
    **loglikelihood**: the likeliest of the options. **nll**: nats per token of the written-out reference answer, over
    rows where that answer is right. Intervals: 95 %, bootstrap over questions (Wilson where all are right or wrong).

    **Examples**

        moa eval runs/qwen --tasks math --data data/math --output results/qwen

        moa eval runs/qwen --tasks boolq,arc_easy --data data/commonsense --scoring generate,loglikelihood

        moa eval packaged --data MultiArith.json --data own_questions.jsonl --limit 100

        moa eval runs/qwen --tasks humaneval --data openai/openai_humaneval --execute-code --samples 10 --pass-at 1,10

        moa eval runs/qwen --harness gsm8k,arc_easy --num-fewshot 5

    **Files**: the question sets of the field are those of the LLM-Adapters collection (fields instruction, input,
    output, answer). With --output, an interrupted evaluation goes on where it stopped, and further tasks and scorings
    can be added to it.
    """
    from rich.console import Console

    from moa_peft.base_models import Dtype, Quantization
    from moa_peft.cli.evaluate_code import plan_code, split_code_tasks
    from moa_peft.cli.score_tables import code_table
    from moa_peft.code_evaluation.work import check_code_lengths, score_code_tasks
    from moa_peft.data import Template
    from moa_peft.data.templates import check_template
    from moa_peft.evaluation.folder import EvaluationFolder
    from moa_peft.evaluation.run import ScoringSettings, check_libraries, check_set_lengths, check_sets, check_stored
    from moa_peft.evaluation.selection import select_sets

    check_choice("--template", template, Template)
    check_choice("--dtype", dtype, Dtype)
    check_choice("--quantization", quantization, Quantization)
    words, harness_tasks = split_words(tasks), split_words(harness)
    names, code_names = split_code_tasks(words)
    if not (words or harness_tasks or (data and not tasks)):
        raise UserError("eval: nothing to score. Give --tasks with --data, files with --data, or --harness.")
    has_sets = bool(names or (data and not tasks))
    _refuse_idle(context, has_sets=has_sets, has_code=bool(code_names), has_harness=bool(harness_tasks))
    trained = _trained_template(model)
    settings = ScoringSettings(
        scorings=tuple(split_words(scoring)),
        template=template or trained or "alpaca",  # type: ignore[arg-type]
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        legacy=legacy,
    )
    folder = None if output is None else EvaluationFolder(output)
    if folder is not None:
        folder.check(overwrite=overwrite)
    places = data or ([os.environ["MOA_DATA"]] if tasks and os.environ.get("MOA_DATA") else [])
    sets = select_sets(names, places, limit=limit, train=train) if has_sets else []
    check_sets(sets, settings)
    if sets or code_names:
        check_libraries((questions, kind) for questions in sets for kind in settings.scorings)
    code = plan_code(
        code_names,
        places,
        execute_code=execute_code,
        samples=samples,
        temperature=temperature,
        pass_at=split_words(pass_at),
        # A base model goes on with the start of a module; one that was tuned on instructions gets an instruction.
        template=template or trained,
        max_new_tokens=max_new_tokens,
        limit=limit,
    )
    of_harness: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
    loaded_tasks: Any = None
    if harness_tasks:
        from moa_peft.harness import check_harness_lengths, check_harness_tasks, load_harness_tasks

        check_harness_tasks(harness_tasks, include_path=include_path, **of_harness)
        loaded_tasks = load_harness_tasks(harness_tasks, include_path=include_path)
    console = Console(stderr=True)
    with nullcontext() if folder is None else folder.locked():
        how = {"dtype": dtype, "quantization": quantization, "trust_remote_code": trust_remote_code}
        loaded, about = _load(model, base=base, **how)
        # What the model cannot read is found before earlier results are touched or settings are fixed.
        check_template(settings.template, loaded.tokenizer)
        check_set_lengths(loaded.model, loaded.tokenizer, sets, settings)
        if code is not None:
            check_code_lengths(loaded.model, loaded.tokenizer, code)
        if harness_tasks:
            check_harness_lengths(loaded.model, loaded_tasks)
        about |= {"template": settings.template, "max_new_tokens": max_new_tokens, "legacy": legacy}
        if folder is not None:
            about_sets = {questions.name: _about_set(questions) for questions in sets}
            about_sets |= {} if code is None else code.about()
            folder.open(
                about,
                sets=about_sets,
                command=command_line(context),
                scorings=settings.scorings,
                harness=harness_tasks,
                overwrite=overwrite,
                check=lambda: check_stored(folder, sets, settings),
            )

        def save() -> None:
            if folder is not None:
                folder.write(complete=False)

        _score(loaded, sets, settings, folder=folder, title=model, console=console, save=save)
        if code is not None:
            scores = score_code_tasks(
                loaded.model,
                loaded.tokenizer,
                code,
                folder=folder,
                batch_size=batch_size,
                console=console,
                after_task=save,
            )
            Console().print(code_table(scores))
        if harness_tasks:
            of_harness["apply_chat_template"] = settings.template == "chat"
            console.print(f"lm-evaluation-harness: {', '.join(harness_tasks)}", highlight=False, markup=False)
            _score_harness(loaded, loaded_tasks, names=harness_tasks, folder=folder, **of_harness)
        if folder is not None:
            folder.write(complete=True)
            console.print(f"Saved in {output}.", highlight=False, markup=False)


def _about_set(questions: QuestionSet) -> dict[str, Any]:
    task = questions.task
    return {
        "task": task.name,
        "suite": task.suite,
        "version": task.version,
        "digest": questions.digest,
        "rows": len(questions.examples),
        **({"parts_digest": questions.parts_digest} if questions.parts else {}),
    }


def _load(model: str, *, base: str | None, **options: Any) -> tuple[LoadedAdapter, dict[str, Any]]:
    """The model with its tokenizer, and what identifies it in a results file."""
    import torch

    from moa_peft.adapter_loading import LoadedAdapter, is_adapter_folder, load_adapter
    from moa_peft.base_models import load_model, load_tokenizer
    from moa_peft.evaluation.digests import adapter_digest, base_digest

    path = Path(model).expanduser()
    if is_adapter_folder(path):
        loaded, kind = load_adapter(model, base=base, **options), "adapter"
    elif base is not None:
        raise UserError(f"--base: {model!r} is no adapter folder (no adapter_config.json), so it has no base model.")
    else:
        plain: Any = load_model(model, **options)
        if getattr(plain, "peft_config", None):
            # transformers has put the adapter on its base; whose predictions these are could not be told.
            raise UserError(f"eval: {model!r} is an adapter on the hub. Download it, and give its folder.")
        tokenizer = load_tokenizer(model, trust_remote_code=options["trust_remote_code"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        plain = plain if options["quantization"] != "none" else plain.to(device)
        loaded = LoadedAdapter(model=plain.eval(), tokenizer=tokenizer, template=None)
        kind = "base model"
    stored = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    about = {
        "model": model,
        "kind": kind,
        "adapter_digest": adapter_digest(path),
        "base": base,
        "base_digest": base_digest(loaded.model),
        "dtype": stored,
    }
    return loaded, {**about, "quantization": options["quantization"], "decoding": "greedy"}


def _trained_template(model: str) -> str | None:
    """The template that an adapter was trained with; None for a base model, or without a record of it."""
    from moa_peft.adapter_loading import is_adapter_folder, trained_template

    path = Path(model).expanduser()
    return trained_template(path) if is_adapter_folder(path) else None


def _score(
    loaded: LoadedAdapter,
    sets: list[QuestionSet],
    settings: ScoringSettings,
    *,
    folder: EvaluationFolder | None,
    title: str,
    console: Any,
    save: Callable[[], None],
) -> None:
    from rich.console import Console

    from moa_peft.cli.score_tables import score_tables
    from moa_peft.evaluation.run import score_sets
    from moa_peft.evaluation.scores import suite_means

    if not sets:
        return

    results = score_sets(
        loaded.model, loaded.tokenizer, sets, settings, folder=folder, console=console, after_set=save
    )
    means = suite_means({questions.name: questions.task.suite for questions in sets}, results)
    for table in score_tables(results, means, title=title):
        Console().print(table)


def _score_harness(
    loaded: LoadedAdapter, tasks: Any, *, names: list[str], folder: EvaluationFolder | None, **options: Any
) -> None:
    from rich.console import Console

    from moa_peft.cli.score_tables import harness_table
    from moa_peft.harness import run_harness

    result = run_harness(loaded.model, loaded.tokenizer, tasks, **options)
    if folder is not None:
        folder.add_harness(result.to_dict(), tasks=names)
        folder.write_samples(result.samples)
    Console().print(harness_table(result))


def _refuse_idle(context: typer.Context, *, has_sets: bool, has_code: bool, has_harness: bool) -> None:
    """Refuse options that are given and would do nothing."""
    generates = has_sets and "generate" in split_words(context.params["scoring"])
    needed = {
        ("samples", "temperature", "pass_at", "execute_code"): (has_code, "humaneval and mbpp"),
        ("num_fewshot", "include_path"): (has_harness, "--harness"),
        ("scoring", "train"): (has_sets, "question sets"),
        ("max_new_tokens",): (has_sets or has_code, "question sets and code"),
        ("legacy",): (generates, "generated answers"),
    }
    for names, (is_needed, purpose) in needed.items():
        for name in names:
            source = context.get_parameter_source(name)
            if not is_needed and source is not None and source.name != "DEFAULT":
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is for {purpose}, and none is asked for. Leave it out, or ask for them.")
