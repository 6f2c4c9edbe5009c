"""Log-likelihoods of given continuations, for choosing among options and for measuring reference answers.

Shapes: B rows, T tokens of the longest, N scored positions of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from moa_peft.errors import UserError
from moa_peft.generation import max_positions
from moa_peft.pooling import PROMPT_MASK
from moa_peft.training.labelled_positions import LabelledPositions, restricted_output_layer

_MAX_POSITIONS = 1024
"""Scored positions of a batch: with 262,144 words, their float32 logits are 1 GiB."""
_CHUNK = 128
"""Positions whose log-softmax is taken at a time."""


@dataclass(frozen=True)
class Continuation:
    """A text to score, as tokens: log p(tokens | prompt)."""

    prompt: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """Natural logarithm of the probability of all tokens of a continuation, and their number."""

    log_prob: float
    num_tokens: int


@dataclass
class _Row:
    """What the model reads once for all continuations that differ in their last token at most."""

    ids: list[int]
    num_prompt: int
    wanted: list[int]  # positions in the list of continuations

    @property
    def num_scored(self) -> int:
        return len(self.ids) - self.num_prompt + 1


def continuation_likelihoods(
    model: Any,
    continuations: Sequence[Continuation],
    *,
    batch_size: int,
    console: Console | None = None,
    on_batch: Callable[[dict[int, Likelihood]], None] | None = None,
) -> list[Likelihood]:
    """Score continuations; those that share everything but their last token are read once.

    Rows are batched by length, padded on the right, and only scored positions pass the output layer. An adapter that
    routes by the prompt is told which tokens are the prompt.

    Args:
        model: a causal language model, with or without adapters.
        continuations: prompts and what follows them, at least one token each.
        batch_size: rows at a time at most.
        console: where a progress bar is shown; None for none.
        on_batch: receives the results of every batch by position in `continuations`.

    Returns:
        One result for each continuation, in their order.

    Raises:
        UserError: a row is longer than the model can read, or the batch size is below 1; nothing is scored then. Or a
            log-probability is not finite.
    """
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is not allowed; give at least 1.")
    check_continuations(model, continuations)
    results: list[Likelihood | None] = [None] * len(continuations)
    was_training = model.training
    model.eval()
    try:
        with Progress(console=console, disable=console is None) as bar, torch.inference_mode():
            task = bar.add_task("scoring", total=len(continuations))
            for rows in _batches(_rows(continuations), batch_size):
                found = _score_batch(model, rows, continuations)
                for position, likelihood in found.items():
                    results[position] = likelihood
                if on_batch is not None:
                    on_batch(found)
                bar.advance(task, len(found))
    finally:
        model.train(was_training)
    return [result for result in results if result is not None]


def check_continuations(model: Any, continuations: Sequence[Continuation]) -> None:
    """Refuse continuations that are longer, with their prompt, than the model can read.

    Raises:
        UserError: naming the length of the longest.
    """
    positions = max_positions(model.config)
    longest = max((len(row.prompt) + len(row.tokens) - 1 for row in continuations), default=0)
    if positions is not None and longest > positions:
        raise UserError(
            f"scoring: a question with its answer has {longest} tokens, but the model has {positions} positions. "
            "Shorten or leave out the longest questions."
        )


def _rows(continuations: Sequence[Continuation]) -> list[_Row]:
    rows: dict[tuple[int, tuple[int, ...]], _Row] = {}
    for position, continuation in enumerate(continuations):
        assert continuation.prompt and continuation.tokens
        ids = [*continuation.prompt, *continuation.tokens[:-1]]
        key = (len(continuation.prompt), tuple(ids))
        row = rows.setdefault(key, _Row(ids=ids, num_prompt=len(continuation.prompt), wanted=[]))
        row.wanted.append(position)
    # Longest first: if memory does not suffice, that shows in the first batch.
    return sorted(rows.values(), key=lambda row: -len(row.ids))


def _batches(rows: Sequence[_Row], batch_size: int) -> list[list[_Row]]:
    batches: list[list[_Row]] = []
    scored = 0
    for row in rows:
        if not batches or len(batches[-1]) == batch_size or scored + row.num_scored > _MAX_POSITIONS:
            batches.append([])
            scored = 0
        batches[-1].append(row)
        scored += row.num_scored
    return batches


def _score_batch(model: Any, rows: list[_Row], continuations: Sequence[Continuation]) -> dict[int, Likelihood]:
    device = next(model.parameters()).device
    length = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    scored_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    prompt_BT = torch.zeros_like(scored_BT)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row.ids)] = torch.tensor(row.ids)
        mask_BT[index, : len(row.ids)] = 1
        # Position t predicts token t + 1: the last token of the prompt predicts the first of the continuation.
        scored_BT[index, row.num_prompt - 1 : len(row.ids)] = True
        prompt_BT[index, : row.num_prompt] = True
    inputs = {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device), "use_cache": False}
    if routes_by_prompt(model):
        inputs[PROMPT_MASK] = prompt_BT.to(device)
    positions = LabelledPositions(mask_BT=scored_BT.to(device))
    with restricted_output_layer(model.get_output_embeddings(), positions):
        logits = model(**inputs).logits
    logits_NV = (logits if positions.selected else positions.rows(logits)).squeeze(0)
    return _read(logits_NV, rows, continuations)


def _read(logits_NV: torch.Tensor, rows: list[_Row], continuations: Sequence[Continuation]) -> dict[int, Likelihood]:
    """Pick the tokens' log-probabilities out of the logits of a batch's scored positions."""
    pairs = [
        (start + offset, token)
        for start, row in zip(_starts(rows), rows)
        for position in row.wanted
        for offset, token in enumerate(continuations[position].tokens)
    ]
    normaliser_N = torch.cat([chunk.float().logsumexp(dim=-1) for chunk in logits_NV.split(_CHUNK)])
    where = torch.tensor([position for position, _ in pairs], device=logits_NV.device)
    tokens = torch.tensor([token for _, token in pairs], device=logits_NV.device)
    log_probs = (logits_NV[where, tokens].float() - normaliser_N[where]).double().tolist()
    if not all(math.isfinite(log_prob) for log_prob in log_probs):
        raise UserError(
            "scoring: the model gives log-probabilities that are no finite numbers, so nothing can be compared. Its "
            "weights are damaged or diverged, or do not fit its dtype."
        )
    found: dict[int, Likelihood] = {}
    taken = 0
    for row in rows:
        for position in row.wanted:
            count = len(continuations[position].tokens)
            found[position] = Likelihood(sum(log_probs[taken : taken + count]), count)
            taken += count
    return found


def _starts(rows: list[_Row]) -> list[int]:
    starts, total = [], 0
    for row in rows:
        starts.append(total)
        total += row.num_scored
    return starts


def routes_by_prompt(model: Any) -> bool:
    """Whether an active adapter has one routing per sequence, which is pooled over the prompt."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return False
    # An attribute of PEFT's models, a method of transformers' own.
    active: Any = model.active_adapters
    active = active() if callable(active) else active
    return any(getattr(configs.get(name), "granularity", "token") == "sequence" for name in active)
