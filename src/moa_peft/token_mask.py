"""Which tokens are no padding, handed from the model to its blocks where auxiliary losses need to know.

It travels as a call argument, so a recomputed block sees its own call's.
"""

import inspect
from typing import Any

import torch
from torch import nn

from moa_peft.errors import UserError
from moa_peft.pooling import unmasked_tokens

ARGUMENT = "moa_tokens"
"""Name of the call argument by which blocks receive ``[B, T]`` bool."""


def add_token_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Forward pre-hook of a model with auxiliary losses; it does nothing while none is active.

    Raises:
        UserError: if the mask does not tell which tokens are padding.
    """
    if not (model.training and torch.is_grad_enabled()):
        return args, kwargs
    wanted = (getattr(getattr(module, "moa", None), "wants_token_mask", None) for module in model.modules())
    if not any(wants() for wants in wanted if wants is not None):
        return args, kwargs
    arguments = dict(inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments)
    arguments |= kwargs
    source = arguments.get("input_ids")
    source = arguments.get("inputs_embeds") if source is None else source
    assert source is not None
    mask = arguments.get("attention_mask")
    tokens = unmasked_tokens(mask, source.shape[:2], source.device)
    if tokens is None:
        raise UserError(
            "Auxiliary losses leave out padding, and this attention_mask does not tell where it is "
            f"({type(mask).__name__}). Pass a mask of two or four dimensions."
        )
    return args, kwargs | {ARGUMENT: tokens}
