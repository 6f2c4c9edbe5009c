"""Negative log-likelihood of reference answers: a measure with a value for every question, whatever the accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moa_peft.data import Example, Template
from moa_peft.data.templates import encode_examples
from moa_peft.evaluation.likelihood import Continuation, Likelihood, continuation_likelihoods
from moa_peft.evaluation.predictions import ReferenceLikelihood


def reference_likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    template: Template,
    batch_size: int = 32,
    indices: Sequence[int] | None = None,
    on_batch: Callable[[list[ReferenceLikelihood]], None] | None = None,
    console: Console | None = None,
) -> list[ReferenceLikelihood]:
    """Score the written-out answers of questions.

        nll = -log p(answer, end mark | question)      in nats

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        examples: the questions of a set, with answers.
        template: how a prompt is written.
        batch_size: rows at a time.
        indices: positions of the questions to score, see `agreeing_rows`; None for all.
        on_batch: receives the results of every batch as soon as they are there.
        console: where a progress bar is shown; None for none.

    Returns:
        The results in the order of the questions.
    """
    chosen = list(range(len(examples))) if indices is None else list(indices)
    continuations = reference_continuations(tokenizer, examples, template=template, indices=chosen)
    results: dict[int, ReferenceLikelihood] = {}

    def collect(batch: dict[int, Likelihood]) -> None:
        records = [
            ReferenceLikelihood(
                index=chosen[place],
                question=examples[chosen[place]].question,
                nll=-likelihood.log_prob,
                num_tokens=likelihood.num_tokens,
            )
            for place, likelihood in sorted(batch.items())
        ]
        results.update((record.index, record) for record in records)
        if on_batch is not None:
            on_batch(records)

    continuation_likelihoods(model, continuations, batch_size=batch_size, on_batch=collect, console=console)
    return [results[index] for index in sorted(results)]


def reference_continuations(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, template: Template, indices: Sequence[int]
) -> list[Continuation]:
    """The tokens of the written-out answers of questions, end mark included."""
    encoded = encode_examples([examples[index] for index in indices], tokenizer, template=template)
    spans = [(row.input_ids, *row.answers[-1]) for row in encoded]
    return [Continuation(ids[:start], ids[start:end]) for ids, start, end in spans]
