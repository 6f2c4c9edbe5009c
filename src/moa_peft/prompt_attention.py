"""Where the prompt expert joins attention: a wrapper around transformers' attention functions.

Each function keeps its own name in the registry, so masks, kernels and string checks behave as before; the wrapper
returns at once for attention modules without a prompt expert.
"""

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface

from moa_peft.architectures import Architecture
from moa_peft.prompt_addition import PromptState

if TYPE_CHECKING:
    from moa_peft.experts import PromptExpert
    from moa_peft.layer import MoALayer

PROMPT_SITE = "moa_prompt_site"
"""Key in the ``__dict__`` of an attention module; a plain entry is no child module, so state dicts do not see it."""

_WRAPPED = "__moa_wrapped__"
_EAGER = "eager_attention_forward"


class PromptSite:
    """The layer whose prompt experts act in an attention module.

    Args:
        layer: tuner layer of the block.
        architecture: how the family's keys and values are made.
    """

    def __init__(self, layer: "MoALayer", architecture: Architecture) -> None:
        self.layer = layer
        self.architecture = architecture

    def add_to(
        self, attended_BTHK: torch.Tensor, attention: nn.Module, query_BHTK: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """What attention returned plus what the prompt experts add."""
        call = self.layer.calls.current()
        if call is not None:
            call.prompt_ran = True
        slots = self.layer.prompt_slots()
        if not slots:
            return attended_BTHK
        states = [
            PromptState(
                expert,
                *self._keys_and_values(expert, attention, query_BHTK),
                _ones(query_BHTK) if weight_BT1 is None else weight_BT1,
            )
            for expert, weight_BT1 in slots
        ]
        scale = query_BHTK.shape[-1] ** -0.5 if scaling is None else scaling
        return self.layer.fused_path.add_prompt(attended_BTHK, query_BHTK, states, scale)

    def _keys_and_values(
        self, expert: "PromptExpert", attention: nn.Module, query_BHTK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt keys and values, computed once per generation: they live on the key-value cache of the call."""
        call = self.layer.calls.current()
        assert call is not None
        key = ("prompt", id(expert), query_BHTK.dtype)
        witness = expert.embedding
        return call.once_per_generation(
            key, witness, lambda: self._project(expert, attention, query_BHTK), lambda: [witness]
        )

    def _project(
        self, expert: "PromptExpert", attention: nn.Module, query_BHTK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``K_p`` and ``V_p``, each ``[kv heads, P, K]``, from the frozen base projections."""
        block = self.layer.get_base_layer()
        roles = self.architecture.roles
        width, heads = query_BHTK.shape[-1], query_BHTK.shape[1]
        prompt_PD = expert.embedding.to(query_BHTK.dtype)
        # ``forward`` instead of a call: the hooks of our own LoRA experts must not act on the prompt.
        if self.architecture.key_value_layout == "separate":
            key = block.get_submodule(roles["k"]).forward(prompt_PD)
            value = block.get_submodule(roles["v"]).forward(prompt_PD)
        else:
            fused = block.get_submodule(roles["k"]).forward(prompt_PD)
            if self.architecture.key_value_layout == "concatenated":
                key, value = fused[:, heads * width :].chunk(2, dim=-1)
            else:
                _, key, value = fused.view(fused.shape[0], heads, 3 * width).chunk(3, dim=-1)
        key = key.reshape(key.shape[0], -1, width)
        value = value.reshape(value.shape[0], -1, width)
        norm = getattr(attention, self.architecture.key_norm or "", None)
        if norm is not None:
            key = norm(key)
        return key.transpose(0, 1), value.transpose(0, 1)


def _ones(query_BHTK: torch.Tensor) -> torch.Tensor:
    """``[B, T, 1]`` the weight of experts without a router."""
    return query_BHTK.new_ones(query_BHTK.shape[0], query_BHTK.shape[2], 1, dtype=torch.float32)


def _with_prompt(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` plus the prompt experts of the attention module it is called for."""

    @functools.wraps(function)
    def attention_with_prompt(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = function(module, query, *args, **kwargs)
        site = module.__dict__.get(PROMPT_SITE)
        if site is None:
            return result
        return (site.add_to(result[0], module, query, kwargs.get("scaling")), *result[1:])

    setattr(attention_with_prompt, _WRAPPED, True)
    return attention_with_prompt


def install_prompt_attention(attention: nn.Module) -> None:
    """Make every registered attention function, and the family's eager one, serve prompt experts.

    Idempotent. The eager function is not in the registry: each modeling module passes its own as the default, looked
    up by name when attention runs, so it is wrapped there.

    Args:
        attention: an attention module of the model.
    """
    for name, function in list(AttentionInterface._global_mapping.items()):
        if not hasattr(function, _WRAPPED):
            AttentionInterface.register(name, _with_prompt(function))
    for cls in type(attention).__mro__:
        namespace = vars(sys.modules.get(cls.__module__, object))
        if _EAGER in namespace and not hasattr(namespace[_EAGER], _WRAPPED):
            setattr(sys.modules[cls.__module__], _EAGER, _with_prompt(namespace[_EAGER]))
