"""The fused path of experts that are a product of linear layers (`moa_peft.experts.Factors`).

Experts that read the same tensor x share one product, with the routers that read x too::

    z     = x [R_1; ...; R_n; router]^T          one matrix product
    inner = activation(z) * (w M)                w routing weights, M puts each weight and scale on its columns
    out  += inner_site [W_1 ... W_m]^T           into the base output, one product per site

The weights multiply ``[.., R]`` numbers instead of ``[.., out]``, nothing of the size of a hidden state is made, and
the number of operations does not grow with the number of experts.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from moa_peft.experts import Expert, Factors
from moa_peft.initialization import MasterLinear
from moa_peft.listeners import is_plain
from moa_peft.packed import add_in_place, columns, is_transformed
from moa_peft.routing import Routing
from moa_peft.sites import UNROUTED, Site


@dataclass(frozen=True, eq=False)
class Part:
    """One expert of a site.

    Attributes:
        mixture: name of its mixture.
        columns: its columns in the routing of the mixture.
        factors: its factors.
        expert: the expert.
    """

    mixture: str
    columns: tuple[int, ...]
    factors: Factors
    expert: Expert

    @property
    def rank(self) -> int:
        """Width of what it reads."""
        return self.factors.read.out_features

    @property
    def spread_rank(self) -> int:
        """Width of what its routing weights multiply: the rank, once for each of them."""
        return self.rank * len(self.columns)

    @property
    def inner_rank(self) -> int:
        """Width of what its `writes` read together."""
        return self.rank if self.factors.has_cores else self.spread_rank

    def expand(self, z: torch.Tensor) -> torch.Tensor:
        """``[.., R]`` to ``[.., n R]``, what each of its n routing weights multiplies."""
        if self.factors.has_cores:
            cores: torch.Tensor = self.expert.cores  # type: ignore[assignment]
            return F.linear(z, cores.flatten(0, 1).to(z.dtype))
        return z if len(self.columns) == 1 else z.repeat(*[1] * (z.dim() - 1), len(self.columns))

    def reduce(self, weighted: torch.Tensor) -> torch.Tensor:
        """``[.., n R]`` weighted to what its `writes` read."""
        if not self.factors.has_cores:
            return weighted
        return weighted.unflatten(-1, (len(self.columns), self.rank)).sum(-2)


class SiteProduct:
    """The experts at one site, as one product.

    Args:
        site: the site.
        parts: the experts.
    """

    def __init__(self, site: Site, parts: Iterable[Part]) -> None:
        self.site = site
        # Columns with the same activation stand together, so that it is applied once.
        self.parts = sorted(parts, key=lambda part: repr(part.factors.activation))
        self.rank = sum(part.inner_rank for part in self.parts)
        self.dropout = self.parts[0].factors.dropout
        # Experts at one site that drop with different probabilities cannot share a product.
        self.mixed_dropout = any(part.factors.dropout != self.dropout for part in self.parts)
        self.is_linear = all(part.factors.activation is None for part in self.parts)
        self.read_biased = any(part.factors.read.bias is not None for part in self.parts)
        self.biased = [part for part in self.parts if part.factors.writes[0].bias is not None]

    @property
    def drops(self) -> bool:
        """Whether elements of its input are dropped in the coming forward."""
        return self.dropout > 0 and self.parts[0].expert.training

    def writes(self) -> list[torch.Tensor]:
        """The parts of the matrix ``[out, R]`` that all experts write with, a column for each bias last."""
        biases = [part.factors.writes[0].bias for part in self.biased]
        weights = [write.weight for part in self.parts for write in part.factors.writes]
        return weights + [bias for bias in biases if bias is not None]

    def obstacle(self) -> str | None:
        """Why the experts take the plain path in this forward; None where they take this one."""
        if self.mixed_dropout:
            return "experts of one site drop with different probabilities"
        linears = [linear for part in self.parts for linear in (part.factors.read, *part.factors.writes)]
        if not all(map(is_plain, [*(part.expert for part in self.parts), *linears])):
            return "a hook listens to an expert or its linear layers, or keeps their weights elsewhere"
        return None


class SharedInput:
    """The sites of one adapter in one block that read the same tensor.

    Args:
        name: what is read.
        products: the sites.
        widths: number of routing weights of each mixture.
        routers: the mixtures whose routers read the tensor too.
        routed_by_core: whether routers at the sites read what their experts read from the tensor.
    """

    def __init__(
        self,
        name: str,
        products: list[SiteProduct],
        *,
        widths: Mapping[str, int],
        routers: tuple[str, ...],
        routed_by_core: bool,
    ) -> None:
        self.name = name
        self.products = products
        self.routers = routers
        self._widths = widths
        self.dropout = products[0].dropout
        self.parts = [part for product in products for part in product.parts]
        self.sources = tuple(dict.fromkeys(part.mixture for part in self.parts))
        self.routed_by_core = tuple(s for s in self.sources if s != UNROUTED) if routed_by_core else ()
        self.is_simple = all(part.spread_rank == part.rank and not part.factors.has_cores for part in self.parts)
        # Runs of columns with one activation.
        self.runs = [
            (activation, sum(part.rank for part in run))
            for activation, run in groupby(self.parts, key=lambda part: part.factors.activation)
        ]
        offsets, total = {}, 0
        for source in self.sources:
            offsets[source] = total
            total += widths[source]
        self.columns = sorted({offsets[part.mixture] + column for part in self.parts for column in part.columns})
        self._bias_columns = {
            product.site: [offsets[part.mixture] + part.columns[0] for part in product.biased] for product in products
        }
        self._spread = [[0.0] * sum(part.spread_rank for part in self.parts) for _ in range(total)]
        start = 0
        for part in self.parts:
            for column in part.columns:
                stop = start + part.rank
                row = self._spread[offsets[part.mixture] + column]
                row[start:stop] = [part.factors.scale] * part.rank
                start = stop
        self._spreads: dict[tuple[object, ...], torch.Tensor] = {}

    @functools.cached_property
    def by_site(self) -> dict[Site, "SharedInput"]:
        """Every site by itself, with the routers of its own experts."""
        found = {}
        for product in self.products:
            own = {part.mixture for part in product.parts}
            found[product.site] = SharedInput(
                f"{self.name}, {' > '.join(product.site)} alone",
                [product],
                widths=self._widths,
                routers=tuple(router for router in self.routers if router in own),
                routed_by_core=bool(self.routed_by_core),
            )
        return found

    @functools.cached_property
    def singles(self) -> list["SharedInput"]:
        """Every expert here by itself."""
        return [
            SharedInput(
                self.name, [SiteProduct(product.site, [part])], widths=self._widths, routers=(), routed_by_core=False
            )
            for product in self.products
            for part in product.parts
        ]

    @property
    def drops(self) -> bool:
        """Whether the experts read another tensor than the routers in the coming forward."""
        return self.products[0].drops

    def obstacle(self) -> str | None:
        """Why these sites take the plain path in this forward; None where they take this one."""
        return next(filter(None, (product.obstacle() for product in self.products)), None)

    def linears(self) -> list[MasterLinear]:
        """The layers of the experts that read the tensor."""
        return [part.factors.read for part in self.parts]

    def read_of(self, mixture: str, z: torch.Tensor) -> torch.Tensor:
        """``[.., R]`` what the first expert of a mixture reads, out of what all read."""
        start = 0
        for part in self.parts:
            if part.mixture == mixture:
                return z[..., start : start + part.rank]
            start += part.rank
        raise KeyError(mixture)

    def weights(self, routings: Mapping[str, Routing], like: torch.Tensor) -> torch.Tensor:
        """``[.., E]`` the routing weights of all mixtures here, side by side, in the dtype of `like`.

        Args:
            routings: by mixture; experts without a router have the weight 1.
            like: ``[.., R]``.
        """
        found = []
        for source in self.sources:
            if source == UNROUTED:
                found.append(like.new_ones(*like.shape[:-1], self._widths[source]))
            else:
                weights = routings[source].weights
                if weights.dim() != like.dim():
                    weights = weights.reshape(*like.shape[:-1], weights.shape[-1])
                found.append(weights.to(like.dtype))
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def active_tokens(self, weights: torch.Tensor) -> torch.Tensor:
        """``[n]`` the tokens for which an expert here has a weight.

        Args:
            weights: ``[.., E]``.
        """
        flat = weights.reshape(-1, weights.shape[-1])
        return flat[:, self.columns].any(-1).nonzero().squeeze(-1)

    def weighted(self, z: torch.Tensor, weights: torch.Tensor) -> dict[Site, torch.Tensor]:
        """The inner activations times their routing weights, by site.

        Args:
            z: ``[.., R]`` what `linears` returned, side by side.
            weights: ``[.., E]`` routing weights, in the dtype of `z`.

        Returns:
            ``[.., R of the site]``, followed by a column with the weight of each write bias.
        """
        return self.scaled(z, weights @ self.spread_matrix(weights.dtype, weights.device), weights)

    def scaled(self, z: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor) -> dict[Site, torch.Tensor]:
        """The same as `weighted`, from ``weights @ spread_matrix``."""
        z = self._activated(z)
        if self.is_simple:
            inner = z * scales
        else:
            pieces = z.split([part.rank for part in self.parts], dim=-1)
            wide = torch.cat([part.expand(piece) for part, piece in zip(self.parts, pieces)], dim=-1) * scales
            pieces = wide.split([part.spread_rank for part in self.parts], dim=-1)
            inner = torch.cat([part.reduce(piece) for part, piece in zip(self.parts, pieces)], dim=-1)
        if len(self.products) == 1 and not self.products[0].biased:
            return {self.products[0].site: inner}
        found = {}
        for product, piece in zip(self.products, inner.split([product.rank for product in self.products], dim=-1)):
            biases = [weights[..., column : column + 1] for column in self._bias_columns[product.site]]
            found[product.site] = torch.cat([piece, *biases], dim=-1) if biases else piece
        return found

    def _activated(self, z: torch.Tensor) -> torch.Tensor:
        """``[.., R]`` with each expert's activation applied to its columns."""
        if len(self.runs) == 1:
            activation = self.runs[0][0]
            return z if activation is None else activation(z)
        pieces = z.split([size for _, size in self.runs], dim=-1)
        done = [
            piece if activation is None else activation(piece) for (activation, _), piece in zip(self.runs, pieces)
        ]
        return torch.cat(done, dim=-1)

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


def is_same_tensor(read: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `x` is what was read, or the same memory in another shape (heads side by side)."""
    if read is x:
        return True
    if torch.compiler.is_compiling() or read.dim() != x.dim() + 1 or read.numel() != x.numel():
        return False
    if read.dtype != x.dtype or read.requires_grad != x.requires_grad:
        return False
    return read.data_ptr() == x.data_ptr() and read.is_contiguous() and x.is_contiguous()
