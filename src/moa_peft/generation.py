"""Generating text: batches sorted by length, results in input order.

Greedy decoding is exactly greedy: the sampling, penalty and length settings that many base models ship in their
generation_config.json are left out, only their end tokens are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from moa_peft.base_models import pad_token_id
from moa_peft.errors import UserError


def generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    temperature: float | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    seed: int = 0,
    end_ids: Sequence[int] = (),
    is_over: Callable[[str], bool] | None = None,
    names: Sequence[str] | None = None,
    on_batch: Callable[[dict[int, str]], None] | None = None,
    console: Console | None = None,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Continue prompts.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: decodes the new tokens.
        prompts: token ids of each prompt, see `moa_peft.data.render_prompt`.
        max_new_tokens: upper limit of an answer.
        batch_size: prompts at a time. Batches are made of prompts of similar length, padded on the left.
        temperature: sample at this temperature; None decodes greedily (or with beams).
        top_p: sample from the smallest set of tokens with this probability; needs `temperature`.
        num_beams: beams of beam search.
        seed: of the sampling; results then depend on the batch size too.
        end_ids: tokens that end an answer besides the tokenizer's and the base model's end tokens, such as a chat
            template's (`moa_peft.data.end_token_ids`).
        is_over: tells from an answer so far that nothing of interest follows; a batch ends once all its answers are
            over. None: only end tokens and `max_new_tokens` end them.
        names: how messages call each prompt, such as the file and row it is from; default: by its number.
        on_batch: receives the answers of every batch as soon as they are there, by position in `prompts`.
        console: where a progress bar is shown when there is more than one batch; None for none.
        streamer: receives tokens as they come; for a single prompt.

    Returns:
        The decoded answers without special tokens, in the order of `prompts`.

    Raises:
        UserError: a value out of its range, an empty prompt, or one that leaves the model no positions to answer.
    """
    _check_settings(temperature, top_p, max_new_tokens=max_new_tokens, batch_size=batch_size, num_beams=num_beams)
    names = names or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    check_prompts(model, prompts, names=names, max_new_tokens=max_new_tokens)
    config = _generation_config(
        model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        end_ids=end_ids,
        do_sample=temperature is not None,
        **({"temperature": temperature, "top_p": top_p or 1.0, "top_k": 0} if temperature is not None else {}),
    )
    torch.manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        with _own_settings_only(model), _contiguous_output_layer(model):
            return _generate_batches(
                model,
                tokenizer,
                prompts,
                config,
                batch_size=batch_size,
                is_over=is_over,
                on_batch=on_batch,
                console=console,
                streamer=streamer,
            )
    finally:
        model.train(was_training)


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], *, names: Sequence[str], max_new_tokens: int) -> None:
    """Refuse prompts that are empty, or that leave the model fewer positions than an answer may take.

    Args:
        model: the causal language model.
        prompts: token ids of each prompt.
        names: how messages call each prompt.
        max_new_tokens: upper limit of an answer.

    Raises:
        UserError: naming the first such prompt.
    """
    positions = max_positions(model.config)
    for name, prompt in zip(names, prompts, strict=True):
        if len(prompt) == 0:
            raise UserError(f"{name} is empty. Give some text.")
        # The last token of an answer is never read, so it needs no position.
        room = None if positions is None else positions - len(prompt) + 1
        if room is not None and room < 1:
            raise UserError(
                f"{name} has {len(prompt)} tokens, but the model has {positions} positions. Shorten the text."
            )
        if room is not None and room < max_new_tokens:
            raise UserError(
                f"max_new_tokens: {max_new_tokens} do not fit behind {name}, which has {len(prompt)} tokens, as the "
                f"model has {positions} positions.\nSet max_new_tokens to at most {room}, or shorten the text."
            )


def stream_text(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], **settings: Any) -> str:
    """Continue one prompt and print the text to standard output as it comes; settings as in `generate_texts`."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return generate_texts(model, tokenizer, [prompt], batch_size=1, streamer=streamer, **settings)[0]


def _generate_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    batch_size: int,
    is_over: Callable[[str], bool] | None,
    on_batch: Callable[[dict[int, str]], None] | None,
    console: Console | None,
    streamer: BaseStreamer | None,
) -> list[str]:
    # Longest first: if memory does not suffice, that shows in the first batch.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers = [""] * len(prompts)
    with Progress(console=console, disable=console is None or len(batches) < 2) as bar:
        task = bar.add_task("generating", total=len(prompts))
        for batch in batches:
            chosen = [prompts[index] for index in batch]
            texts = _generate_batch(model, tokenizer, chosen, config, is_over=is_over, streamer=streamer)
            found = dict(zip(batch, texts, strict=True))
            for index, text in found.items():
                answers[index] = text
            if on_batch is not None:
                on_batch(found)
            bar.advance(task, len(batch))
    return answers


def _generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Sequence[int]],
    config: GenerationConfig,
    *,
    is_over: Callable[[str], bool] | None,
    streamer: BaseStreamer | None,
) -> list[str]:
    length = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    ids = torch.full((len(prompts), length), pad_token_id(tokenizer), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, length - len(prompt) :] = 1
    criteria = [] if is_over is None else [_AnswersAreOver(tokenizer, prompt_tokens=length, is_over=is_over)]
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(criteria),
            logits_processor=LogitsProcessorList([_LogitsAreNumbers()]),
            streamer=streamer,
        )
    return tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)


def _generation_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, end_ids: Sequence[int], **settings: Any
) -> GenerationConfig:
    stored = getattr(model, "generation_config", None)
    ends: Any = getattr(stored, "eos_token_id", None)
    own: Any = tokenizer.eos_token_id
    stops = {own, *end_ids, *(ends if isinstance(ends, list) else [ends])} - {None}
    return GenerationConfig(
        eos_token_id=sorted(stops), pad_token_id=pad_token_id(tokenizer), use_cache=True, **settings
    )


@contextmanager
def greedy_settings(model: Any, tokenizer: PreTrainedTokenizerBase, *, end_ids: Sequence[int] = ()) -> Iterator[None]:
    """Let other code that calls `model.generate` decode as `generate_texts` does, unless it says otherwise itself.

    Of the base's generation settings only the end tokens count; `end_ids` are further ones.
    """
    config = _generation_config(model, tokenizer, end_ids=end_ids, do_sample=False)
    with _own_settings_only(model, config), _contiguous_output_layer(model):
        yield


@contextmanager
def _own_settings_only(model: Any, own: GenerationConfig | None = None) -> Iterator[None]:
    """Hide the base's generation_config, from which `generate` would fill every setting that ours leaves open."""
    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    stored = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = own or GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, stored, strict=True):
            owner.generation_config = config


@contextmanager
def _contiguous_output_layer(model: Any) -> Iterator[None]:
    """Hand the output layer a contiguous input.

    Models pass it a view of the last position of every row. On the CPU torch then multiplies row by row in bfloat16,
    with a copy of the weight for each: minutes and tens of GiB where the vocabulary is large, not milliseconds.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        yield
        return
    handle = layer.register_forward_pre_hook(_make_contiguous)
    try:
        yield
    finally:
        handle.remove()


def _make_contiguous(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0].contiguous(), *args[1:])


class _LogitsAreNumbers(LogitsProcessor):
    """Stops a model that is broken, whose answers would be any token; looked at where an answer begins."""

    def __init__(self) -> None:
        self._is_checked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        if not self._is_checked and bool(scores.isnan().any()):
            raise UserError(
                "generation: the model gives logits that are no numbers (NaN). Its weights are damaged or diverged, "
                "or do not fit its dtype."
            )
        self._is_checked = True
        return scores


class _AnswersAreOver(StoppingCriteria):
    """Marks the rows whose answer is over, so that generation ends with the last of them."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, prompt_tokens: int, is_over: Callable[[str], bool]
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._is_over = is_over

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        # Decoding a batch of answers takes a few milliseconds, against a forward pass for every one of these calls.
        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt_tokens :], skip_special_tokens=True)
        return torch.tensor([self._is_over(text) for text in texts], dtype=torch.bool, device=input_ids.device)


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence a base model can read, None where its configuration names no limit.

    Rotary embeddings that are stretched beyond the trained length (linear, dynamic, yarn) count as stretched.
    """
    text_config: Any = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    rope = getattr(text_config, "rope_parameters", None) or {}
    factor = rope.get("factor") if rope.get("rope_type") in ("linear", "dynamic", "yarn") else None
    return limit if factor is None else max(limit, int(limit * factor))


def _check_settings(temperature: float | None, top_p: float | None, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name}: {value} is not allowed; give at least 1.")
    if temperature is not None and not temperature > 0:
        raise UserError(f"temperature: {temperature} is not allowed; give more than 0, or leave it out for greedy.")
    if top_p is not None and temperature is None:
        raise UserError("top_p: needs temperature; without it decoding is greedy.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p: {top_p} is not allowed; give more than 0 and at most 1.")
