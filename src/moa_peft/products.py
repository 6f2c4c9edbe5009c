"""The fused path of experts that are a product of two linear layers (`moa_peft.experts.Factors`).

Experts that read the same tensor x share one product, with the router where it reads x too::

    z     = x [R_1; ...; R_n; router]^T          one matrix product
    inner = activation(z) * (w M)                w routing weights, M puts each weight and scale on its columns
    out  += inner_site [W_1 ... W_m]^T           into the base output, one product per site

The weights multiply ``[.., R]`` numbers instead of ``[.., out]``, nothing of the size of a hidden state is made, and
the number of operations does not grow with the number of experts.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as global_hooks

from moa_peft.experts import Expert, Factors
from moa_peft.initialization import MasterLinear
from moa_peft.packed import add_in_place, columns, is_transformed
from moa_peft.plan import Site


class SiteProduct:
    """The experts of one mixture at one site, as one product.

    Args:
        site: the site.
        experts: columns in the routing, and the experts; all have factors.
        num_experts: columns E of the routing.
    """

    def __init__(self, site: Site, experts: Iterable[tuple[int, Expert]], num_experts: int) -> None:
        self.site = site
        self.num_experts = num_experts
        found = [(column, expert, expert.factors()) for column, expert in experts]
        self.experts = [expert for _, expert, _ in found]
        self.parts: list[tuple[int, Factors]] = [(column, factors) for column, _, factors in found if factors]
        # Columns with the same activation stand together, so that it is applied once.
        self.parts.sort(key=lambda part: repr(part[1].activation))
        self.rank = sum(factors.read.out_features for _, factors in self.parts)
        self.activated = any(factors.activation is not None for _, factors in self.parts)
        self.read_biased = any(factors.read.bias is not None for _, factors in self.parts)
        self.biased = [(column, factors) for column, factors in self.parts if factors.write.bias is not None]

    def writes(self) -> list[torch.Tensor]:
        """The parts of the matrix ``[out, R]`` that all experts write with, a column for each bias last."""
        biases = [factors.write.bias for _, factors in self.biased]
        return [factors.write.weight for _, factors in self.parts] + [bias for bias in biases if bias is not None]

    def active_tokens(self, weights: torch.Tensor) -> torch.Tensor:
        """``[n]`` the tokens for which an expert of the site has a weight.

        Args:
            weights: ``[.., E]``.
        """
        columns = sorted({column for column, _ in self.parts})
        return weights.reshape(-1, weights.shape[-1])[:, columns].any(-1).nonzero().squeeze(-1)

    def obstacle(self) -> str | None:
        """Why the experts take the plain path in this forward; None where they take this one."""
        if not all(expert.is_product() for expert in self.experts):
            return "an expert drops elements of its input (dropout, in training)"
        linears = [linear for _, factors in self.parts for linear in (factors.read, factors.write)]
        if not all(map(is_plain, [*self.experts, *linears])):
            return "a hook listens to an expert or its linear layers, or keeps their weights elsewhere"
        return None


class SharedInput:
    """The sites of one mixture that read the same tensor.

    Args:
        name: what is read.
        products: the sites.
    """

    def __init__(self, name: str, products: list[SiteProduct]) -> None:
        self.name = name
        self.products = products
        self.parts = [part for product in products for part in product.parts]
        # Runs of columns with one activation.
        self.runs = [
            (activation, sum(factors.read.out_features for _, factors in run))
            for activation, run in groupby(self.parts, key=lambda part: part[1].activation)
        ]
        width = sum(size for _, size in self.runs)
        self._spread = [[0.0] * width for _ in range(products[0].num_experts)]
        start = 0
        for column, factors in self.parts:
            stop = start + factors.read.out_features
            self._spread[column][start:stop] = [factors.scale] * (stop - start)
            start = stop
        self._spreads: dict[tuple[object, ...], torch.Tensor] = {}

    def obstacle(self) -> str | None:
        """Why these sites take the plain path in this forward; None where they take this one."""
        return next(filter(None, (product.obstacle() for product in self.products)), None)

    def linears(self) -> list[MasterLinear]:
        """The layers that read the tensor."""
        return [factors.read for _, factors in self.parts]

    def weighted(self, z: torch.Tensor, weights: torch.Tensor) -> dict[Site, torch.Tensor]:
        """The inner activations times their routing weights, by site.

        Args:
            z: ``[.., R]`` what `linears` returned, side by side.
            weights: ``[.., E]`` routing weights.

        Returns:
            ``[.., R of the site]``, followed by a column with the weight of each write bias.
        """
        weights = weights.to(z.dtype)
        return self.by_site(self.activated(z) * self.spread(weights), weights)

    def by_site(self, inner: torch.Tensor, weights: torch.Tensor) -> dict[Site, torch.Tensor]:
        """``[.., R]`` weighted inner activations by site; see `weighted`."""
        if len(self.products) == 1 and not self.products[0].biased:
            return {self.products[0].site: inner}
        pieces = inner.split([product.rank for product in self.products], dim=-1)
        found = {}
        for product, piece in zip(self.products, pieces):
            biases = [weights[..., column : column + 1] for column, _ in product.biased]
            found[product.site] = torch.cat([piece, *biases], dim=-1) if biases else piece
        return found

    def activated(self, z: torch.Tensor) -> torch.Tensor:
        """``[.., R]`` with each expert's activation applied to its columns."""
        if len(self.runs) == 1:
            activation = self.runs[0][0]
            return z if activation is None else activation(z)
        pieces = z.split([size for _, size in self.runs], dim=-1)
        done = [
            piece if activation is None else activation(piece) for (activation, _), piece in zip(self.runs, pieces)
        ]
        return torch.cat(done, dim=-1)

    def spread(self, weights: torch.Tensor) -> torch.Tensor:
        """``[.., E]`` routing weights to ``[.., R]``: each weight times the expert's scale, on its columns."""
        return weights @ self.spread_matrix(weights.dtype, weights.device)

    def spread_matrix(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """``[E, R]``: an expert's scale on its own columns, 0 elsewhere."""
        if torch.compiler.is_compiling():
            return torch.tensor(self._spread, dtype=dtype, device=device)
        # A tensor made in inference mode cannot be used in training later, and a fake one nowhere else.
        key = (device, dtype, torch.is_inference_mode_enabled())
        if key in self._spreads:
            return self._spreads[key]
        spread = torch.tensor(self._spread, dtype=dtype, device=device)
        if type(spread) is torch.Tensor:
            self._spreads[key] = spread
        return spread


def is_plain(module: nn.Module) -> bool:
    """Whether a layer may be replaced by its weights: no hook listens, and they are in place."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not (hooks or "_hf_hook" in own or "forward" in own or has_global_hooks())


def has_global_hooks() -> bool:
    """Whether a hook listens to every module."""
    forward = global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks
    return bool(forward or global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks)


def add_product(
    output: torch.Tensor,
    inner: torch.Tensor,
    write: torch.Tensor | Sequence[torch.Tensor],
    *,
    in_place: bool,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """``output + inner write^T``.

    Args:
        output: ``[.., out]``.
        inner: ``[.., R]``, or ``[n, R]`` with `index`.
        write: ``[out, R]``, or the parts of it (`moa_peft.packed.columns`).
        in_place: whether `output` is needed by nobody else.
        index: ``[n]`` the tokens that `inner` is of; None: all of them.
    """
    inner = inner.to(output.dtype)
    owned = in_place and output.is_contiguous() and not torch.compiler.is_compiling() and not is_transformed()
    if not isinstance(write, torch.Tensor):
        if owned and output._base is None:
            return add_in_place(output, inner, write, index)
        write, owned = columns(write, output.dtype), False
    if torch.compiler.is_compiling():
        return output + F.linear(inner, write)
    flat = output.view(-1, output.shape[-1]) if owned else output.reshape(-1, output.shape[-1])
    inner = inner.reshape(-1, inner.shape[-1])
    if index is not None:
        part = inner @ write.t()
        total = flat.index_add_(0, index, part) if owned else flat.index_add(0, index, part)
    else:
        total = flat.addmm_(inner, write.t()) if owned else torch.addmm(flat, inner, write.t())
    return total.view(output.shape)
