"""Prompt expert: attention to a learned prompt behind a zero-initialised gate (LLaMA-Adapter, arXiv 2303.16199).

With learned prompt embeddings P, and queries q as the base attention uses them (after rotation)::

    K_p, V_p = W_k P, W_v P          the frozen base projections, with their bias; no rotation
    out = w * g_h * softmax(scaling * q K_p^T) V_p

The softmax runs over the prompt alone, in float32, so no key-value cache entry and no mask is involved. The gate g
has one number per head, starts at zero (the expert is then exactly off) and multiplies plainly, without tanh, as in
MoA (arXiv 2506.05928).
"""

from dataclasses import dataclass

import torch
from torch import nn

from moa_peft.experts.base import EXPERTS, Expert, ExpertOptions, SiteShape
from moa_peft.fields import check_positive_int
from moa_peft.initialization import NORMAL_STD, Init


@dataclass(kw_only=True)
class PromptOptions(ExpertOptions):
    """Options of ``{type: prompt, ...}``.

    Attributes:
        length: number P of learned prompt tokens.
    """

    length: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("length", self.length)


@EXPERTS.register("prompt")
class PromptExpert(Expert):
    """Zero-gated attention to a learned prompt, see the module's docstring."""

    Options = PromptOptions
    site_kind = "attention"
    options: PromptOptions

    def __init__(self, shape: SiteShape, options: PromptOptions) -> None:
        super().__init__(shape, options)
        assert shape.num_heads is not None
        self.embedding = nn.Parameter(torch.empty(options.length, shape.in_features))
        self.gate = nn.Parameter(torch.empty(1, shape.num_heads, 1, 1))

    def forward(
        self,
        query_BHTK: torch.Tensor,
        key_HPK: torch.Tensor,
        value_HPK: torch.Tensor,
        weight_BT1: torch.Tensor,
        *,
        scaling: float,
    ) -> torch.Tensor:
        """The weighted attention to the prompt.

        Args:
            query_BHTK: queries as the base attention uses them.
            key_HPK: prompt keys, one per key-value head.
            value_HPK: prompt values, one per key-value head.
            weight_BT1: routing weight.
            scaling: factor on the scores, the one the base attention uses.

        Returns:
            ``[B, T, H, K]`` in the dtype of the queries.
        """
        batch, num_heads, tokens, width = query_BHTK.shape
        num_kv_heads = key_HPK.shape[0]
        # Grouped-query attention: heads of one group share a key-value head, so group them instead of repeating keys.
        query = query_BHTK.reshape(batch, num_kv_heads, num_heads // num_kv_heads, tokens, width)
        scores = torch.einsum("bngtk,npk->bngtp", query, key_HPK.to(query.dtype)).float() * scaling
        # The softmax, with its division left to the end: over a handful of prompt tokens torch's own is slow on a CPU.
        exponentials = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
        gate = self.gate.float().reshape(1, num_kv_heads, num_heads // num_kv_heads, 1, 1)
        factor = gate * weight_BT1.float()[:, None, None] / exponentials.sum(-1, keepdim=True)
        output = torch.matmul((exponentials * factor).to(query.dtype), value_HPK.to(query.dtype)[:, None])
        return output.reshape(batch, num_heads, tokens, width).transpose(1, 2)

    def reset_parameters(self, init: Init) -> None:
        nn.init.normal_(self.embedding, std=NORMAL_STD if init == "normal" else 1.0)
        nn.init.zeros_(self.gate)
