"""Sequence granularity: one routing per sequence, pooled over its prompt tokens (instance-level MoA).

``w = router(mean over the prompt of z)``. The released code averages over padding and, in training, over the answer
as well; here only prompt tokens count: unmasked positions before the first label of the row, or of
the segment where several sequences are packed into one row. Without labels, outside training, all unmasked tokens are
the prompt.

What to pool travels as a call argument from the model to its blocks, so a recomputed block pools as its own call did.
In generation the prompt's routing lives on the key-value cache and follows its rows.
"""

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from moa_peft.errors import UserError
from moa_peft.routers import Router
from moa_peft.routing import Routing

ARGUMENT = "moa_pooling"
"""Name of the call argument by which blocks receive the `Pooling`."""

PROMPT_MASK = "prompt_mask"
"""Name of the model argument ``[B, T]`` by which a caller may say itself which tokens are the prompt."""


@dataclass(frozen=True)
class SequenceRouting(Routing):
    """The routings of sequences, repeated for each of their tokens.

    Attributes:
        first: ``[B, T, 1]`` bool, one token of each sequence.
    """

    first: torch.Tensor = field(kw_only=True)


@dataclass(frozen=True)
class Pooling:
    """What the blocks of one forward pool over.

    Attributes:
        prompt: ``[B, T]`` bool, the prompt tokens; None while decoding, when the cache holds the routing.
        segments: ``[B, T]`` integers, which packed sequence a token belongs to; None where a row is one sequence.
    """

    prompt: torch.Tensor | None
    segments: torch.Tensor | None = None

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """``[B, S, T]`` weights that average the prompt tokens of each of S segments."""
        members = self._members()
        return (members / members.sum(-1, keepdim=True).clamp(min=1)).to(dtype)

    def _members(self) -> torch.Tensor:
        """``[B, S, T]`` bool, which prompt tokens belong to each of S segments."""
        assert self.prompt is not None
        if self.segments is None:
            return self.prompt[:, None]
        numbers = torch.arange(int(self.segments.max()) + 1, device=self.segments.device)
        return (self.segments[:, None] == numbers[:, None]) & self.prompt[:, None]

    def spread(self, routing: Routing, tokens: int) -> Routing:
        """``[B, S, E]`` routings of segments as ``[B, T, E]`` routings of their tokens."""

        def one(values: torch.Tensor) -> torch.Tensor:
            if self.segments is None:
                return values.expand(-1, tokens, -1)
            index = self.segments[..., None].expand(-1, -1, values.shape[-1])
            return values.gather(1, index)

        spread = routing.map(one)
        if self.prompt is None:
            return spread
        members = self._members()
        return SequenceRouting(**vars(spread), first=(members & (members.cumsum(-1) == 1)).any(1)[..., None])


def prompt_mask(labels: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Prompt tokens of rows that hold one sequence each: unmasked positions before the first label that is not -100.

    Args:
        labels: ``[B, T]``.
        attention_mask: ``[B, T]``; None is all ones.

    Returns:
        ``[B, T]`` bool.
    """
    unmasked = unmasked_tokens(attention_mask, labels.shape, labels.device)
    assert unmasked is not None
    return _before_first_label(labels, unmasked, None)


def unmasked_tokens(attention_mask: Any, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    """``[B, T]`` bool, the tokens of this call that are no padding; None where the mask does not tell."""
    if isinstance(attention_mask, dict):
        # Generation with a static cache makes one mask per kind of layer; padding is the same in all.
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        # While a cache is in use the mask covers the cached tokens too; those of this call are the last ones.
        return attention_mask[:, -shape[1] :].bool()
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:
        # [B, 1, T, keys], True or 0 where a token sees a key: padding is what does not even see itself.
        own = attention_mask[:, 0, :, : shape[1]].diagonal(dim1=-2, dim2=-1).expand(shape)
        return own if own.dtype == torch.bool else own == 0
    return None


def _before_first_label(labels: torch.Tensor, unmasked: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    labelled = (labels != -100) & unmasked
    seen = labelled.long().cumsum(-1)
    if segments is not None:
        # Labels counted up to the last token of the previous segment do not belong to this one.
        starts = torch.ones_like(segments, dtype=torch.bool)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        before = torch.where(starts, seen - labelled.long(), torch.zeros_like(seen))
        seen = seen - before.cummax(-1).values
    return unmasked & (seen == 0)


def _packed_segments(
    position_ids: torch.Tensor | None, unmasked: torch.Tensor | None, shape: torch.Size
) -> torch.Tensor | None:
    """Segment numbers where position ids start again within a row; None where every row is one sequence."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != shape[1]:
        return None
    position_ids = position_ids.expand(shape)
    restarts = position_ids[:, 1:] <= position_ids[:, :-1]
    if unmasked is not None:
        # The positions of padding mean nothing; generate gives it the same one throughout.
        restarts = restarts & unmasked[:, 1:] & unmasked[:, :-1]
    return F.pad(restarts.long(), (1, 0)).cumsum(-1) if bool(restarts.any()) else None


def plan_pooling(model: nn.Module, arguments: dict[str, Any]) -> Pooling:
    """Decide what the blocks of one forward pool over.

    Args:
        model: the model that is called.
        arguments: its arguments by name.

    Raises:
        UserError: where the prompt cannot be told from the answer.
    """
    source = arguments.get("input_ids")
    source = arguments.get("inputs_embeds") if source is None else source
    assert source is not None
    shape, device = source.shape[:2], source.device
    cache = arguments.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) > 0:
        _check_prompt_was_whole(cache, shape[1], arguments)
        return Pooling(prompt=None)
    given, labels = arguments.get(PROMPT_MASK), arguments.get("labels")
    unmasked = unmasked_tokens(arguments.get("attention_mask"), shape, device)
    segments = _packed_segments(arguments.get("position_ids"), unmasked, shape)
    if given is not None:
        return Pooling(given.bool(), segments)
    if unmasked is None:
        raise UserError(
            "granularity 'sequence' needs an attention_mask of two or four dimensions to tell padding; this one is a "
            f"{type(arguments['attention_mask']).__name__}. Pass {PROMPT_MASK}, a [batch, tokens] mask of the prompt, "
            "instead."
        )
    if labels is not None and labels.shape == shape:
        prompt = _before_first_label(labels, unmasked, segments)
        if not bool(prompt.any(-1).all()):
            raise UserError(
                "granularity 'sequence' pools over the prompt, and a row has a label at its first token, so it has no "
                f"prompt. Train on answers only (loss_on='answer'), or pass {PROMPT_MASK}."
            )
        return Pooling(prompt, segments)
    if labels is None and model.training and torch.is_grad_enabled():
        raise UserError(
            "granularity 'sequence' cannot tell the prompt from the answer in training without labels. Pass labels "
            f"(-100 outside the answer) or {PROMPT_MASK}, a [batch, tokens] mask of the prompt, to the model."
        )
    if labels is None and arguments.get("use_cache") is False:
        raise UserError(
            "granularity 'sequence' without a cache would pool over the tokens generated so far: use_cache is False. "
            f"Generate with use_cache=True; to score a text, pass labels or {PROMPT_MASK}."
        )
    if labels is None and cache is not None and _logits_kept(arguments) > 1:
        raise UserError(
            "granularity 'sequence' cannot start assisted generation (assistant_model, prompt_lookup_num_tokens): its "
            f"first forward holds proposed tokens beside the prompt. Generate without, or pass {PROMPT_MASK}."
        )
    return Pooling(unmasked, segments)


def check_generation(arguments: dict[str, Any]) -> None:
    """Refuse what `generate` is told to do with the prompt before it starts.

    Args:
        arguments: its arguments by name.

    Raises:
        UserError: for a prompt that is to come in chunks.
    """
    size = getattr(arguments.get("generation_config"), "prefill_chunk_size", None)
    size = arguments.get("prefill_chunk_size", size)
    if size is not None:
        raise UserError(
            f"prefill_chunk_size is {size}, and granularity 'sequence' routes by the whole prompt, which the first "
            "chunk does not show. Generate without prefill_chunk_size."
        )


def _check_prompt_was_whole(cache: Cache, tokens: int, arguments: dict[str, Any]) -> None:
    """Refuse further prompt tokens where nothing has been decoded since the prompt that was pooled."""
    # Decoding and the verification of proposed tokens keep the logits of every token of the call.
    in_pieces = tokens > 1 and _logits_kept(arguments) == 1
    if in_pieces and getattr(cache, "moa_prompt_length", None) == int(cache.get_seq_length()):
        raise UserError(
            "granularity 'sequence' routes by the whole prompt, and this one comes in pieces (prefill_chunk_size, or "
            "a cache that holds its beginning): the first piece alone would decide. Generate from the whole prompt "
            "with an empty cache and without prefill_chunk_size."
        )


def _logits_kept(arguments: dict[str, Any]) -> int:
    """`logits_to_keep` as `generate` gives it; 0, for all, where it is not a number."""
    kept = arguments.get("logits_to_keep", 0)
    return kept if isinstance(kept, int) else 0


def add_pooling(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Forward pre-hook of a model with a mixture of sequence granularity: hand the `Pooling` on to its blocks.

    Does nothing while no such mixture is active, so that a disabled or deleted one asks nothing of the caller.
    """
    active = (getattr(getattr(module, "moa", None), "pools_sequences", None) for module in model.modules())
    if not any(pools() for pools in active if pools is not None):
        return args, {key: value for key, value in kwargs.items() if key != PROMPT_MASK}
    arguments = dict(inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments)
    arguments |= kwargs
    kwargs = {key: value for key, value in kwargs.items() if key != PROMPT_MASK}
    return args, kwargs | {ARGUMENT: plan_pooling(model, arguments)}


def route_sequences(
    router: Router, hidden: torch.Tensor, pooling: Pooling | None, cache: Cache | None, key: tuple[int, str]
) -> Routing:
    """Route whole sequences.

    Args:
        router: the mixture's router.
        hidden: ``[B, T, D]`` router input.
        pooling: what to pool over.
        cache: key-value cache of the call, which keeps the routing for the tokens still to come.
        key: identifies the mixture on the cache.

    Returns:
        ``[B, T, E]``, the same for all tokens of a sequence.
    """
    if pooling is None:
        raise UserError(
            "granularity 'sequence': the block was called without what to pool over. Call the whole model; a family "
            "that does not hand unknown arguments to its blocks cannot be used with this granularity."
        )
    if pooling.prompt is None:
        stored = getattr(cache, "moa_routings", {}).get(key)
        if stored is None:
            raise UserError(
                "granularity 'sequence': the key-value cache holds no routing of its prompt; it was filled without "
                "this adapter, or with packed sequences. Start with an empty cache."
            )
        return Pooling(None).spread(stored, hidden.shape[1])
    routing = router(torch.bmm(pooling.matrix(hidden.dtype), hidden))
    if cache is not None and pooling.segments is None:
        _keep(cache, key, routing, hidden.shape[1])
    return pooling.spread(routing, hidden.shape[1])


def _keep(cache: Cache, key: tuple[int, str], routing: Routing, prompt_length: int) -> None:
    if not hasattr(cache, "moa_routings"):
        cache.moa_routings = {}  # type: ignore[attr-defined]
        cache.__class__ = _routed_cache(type(cache))
    cache.moa_prompt_length = prompt_length  # type: ignore[attr-defined]
    cache.moa_routings[key] = routing  # type: ignore[attr-defined]


@functools.cache
def _routed_cache(cache_class: type[Cache]) -> type[Cache]:
    """The same cache class, whose stored routings follow its rows through beam search."""

    def select(self: Any, change: Any) -> None:
        for key, routing in self.moa_routings.items():
            self.moa_routings[key] = routing.map(change)

    def reorder_cache(self: Any, beam_idx: torch.LongTensor) -> None:
        cache_class.reorder_cache(self, beam_idx)
        select(self, lambda values: values.index_select(0, beam_idx.to(values.device)))

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        cache_class.batch_repeat_interleave(self, repeats)
        select(self, lambda values: values.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self: Any, indices: torch.Tensor) -> None:
        cache_class.batch_select_indices(self, indices)
        select(self, lambda values: values[indices])

    methods = {
        "reorder_cache": reorder_cache,
        "batch_repeat_interleave": batch_repeat_interleave,
        "batch_select_indices": batch_select_indices,
        "__module__": cache_class.__module__,
    }
    return type(cache_class.__name__, (cache_class,), methods)
