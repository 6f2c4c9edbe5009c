"""Products between activations in the base model's dtype and float32 master weights."""

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b`` in the dtype of `x`: the small weight is cast, the large activation never is.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``, usually a float32 master weight.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]`` in the dtype of `x`, or in the autocast dtype where autocast is on.
    """
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)
