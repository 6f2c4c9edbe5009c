"""Scoring by likelihood: of a question's options, the one whose statement the model finds likeliest is its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moa_peft.data import Example, Template, end_token_ids
from moa_peft.data.examples import Message
from moa_peft.data.templates import encode_examples
from moa_peft.errors import UserError
from moa_peft.evaluation.likelihood import Continuation, Likelihood, continuation_likelihoods
from moa_peft.evaluation.predictions import Choice
from moa_peft.evaluation.references import reference_answers
from moa_peft.tasks import Task


def choose_options(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    task: Task,
    template: Template,
    batch_size: int = 32,
    indices: Sequence[int] | None = None,
    on_batch: Callable[[list[Choice]], None] | None = None,
    console: Console | None = None,
) -> list[Choice]:
    """Choose among the options of every question.

        answer = argmax over options o of  log p(statement(o) | question)

    where the statement is the sentence that training data answers with ("the correct answer is answer2"), without
    an end mark. Statements differ in the option's label only, so no length has to be corrected for.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        examples: the questions of a set.
        task: what their options are.
        template: how a prompt is written.
        batch_size: rows at a time.
        indices: positions of the questions to score; None for all.
        on_batch: receives the choices that became complete with a batch.
        console: where a progress bar is shown; None for none.

    Returns:
        The choices in the order of the questions.

    Raises:
        UserError: the task has no options, or a question no right one among them.
    """
    chosen = list(range(len(examples))) if indices is None else list(indices)
    owners, continuations = option_continuations(tokenizer, examples, task=task, template=template, indices=chosen)
    references = reference_answers(examples, task.format)
    options = {index: task.row_choices(examples[index]) for index in chosen}
    found: dict[tuple[int, str], Likelihood] = {}
    choices: dict[int, Choice] = {}

    def collect(batch: dict[int, Likelihood]) -> None:
        found.update((owners[place], likelihood) for place, likelihood in batch.items())
        complete = []
        for index in sorted({owners[place][0] for place in batch}):
            if all((index, option) in found for option in options[index]):
                likelihoods = [found[index, option].log_prob for option in options[index]]
                complete.append(
                    choice_of(index, examples[index].question, references[index], options[index], likelihoods)
                )
        choices.update((choice.index, choice) for choice in complete)
        if on_batch is not None and complete:
            on_batch(complete)

    continuation_likelihoods(model, continuations, batch_size=batch_size, on_batch=collect, console=console)
    return [choices[index] for index in sorted(choices)]


def option_continuations(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    task: Task,
    template: Template,
    indices: Sequence[int],
) -> tuple[list[tuple[int, str]], list[Continuation]]:
    """The statements of the options of questions: whose they are (position of the question, option), and their tokens.

    Raises:
        UserError: the task has no options, or a question no right one among them.
    """
    if task.format.kind == "number":
        raise UserError(
            f"scoring: loglikelihood compares options, but the answers of {task.name} are numbers. Use generate."
        )
    references = reference_answers(examples, task.format)
    options = {index: task.row_choices(examples[index]) for index in indices}
    for index in indices:
        if references[index] not in options[index]:
            raise UserError(
                f"data: {examples[index].where} has the answer {references[index]!r}, which is none of its options "
                f"({', '.join(options[index])})."
            )
    ends = set(end_token_ids(tokenizer, template=template))
    owners = [(index, option) for index in indices for option in options[index]]
    statements = [_answered(examples[index], task.format.statement(option)) for index, option in owners]
    continuations = []
    for encoded in encode_examples(statements, tokenizer, template=template):
        start, end = encoded.answers[-1]
        while encoded.input_ids[end - 1] in ends:
            end -= 1
        continuations.append(Continuation(encoded.input_ids[:start], encoded.input_ids[start:end]))
    return owners, continuations


def _answered(example: Example, statement: str) -> Example:
    return replace(example, messages=(*example.prompt_messages, Message("assistant", statement)))


def choice_of(
    index: int, question: str, reference: str, options: tuple[str, ...], likelihoods: Sequence[float]
) -> Choice:
    """The choice that follows from the likelihoods of a question's options."""
    answer = options[max(range(len(options)), key=likelihoods.__getitem__)]
    return Choice(
        index=index,
        question=question,
        reference=reference,
        choices=options,
        log_likelihoods=tuple(likelihoods),
        answers={"choice": answer},
        correct={"choice": answer == reference},
    )
