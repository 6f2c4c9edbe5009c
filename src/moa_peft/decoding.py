"""One more token of a generation: the fused path with everything decided and packed beforehand.

A decoding step is short, so that deciding and packing anew would cost more than the products. Both are done in the
first step and kept for the generation (`moa_peft.call.Call.once_per_generation`).
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from moa_peft.mixture import BlockMixtures
from moa_peft.packed import columns, read_matrix
from moa_peft.products import SharedInput
from moa_peft.routers import Router
from moa_peft.routing import Routing
from moa_peft.sites import BLOCK, Site

KeepRouting = Callable[[str, Routing], None]
"""Hands the routing of a mixture, by its name, to the layer."""


class _PackedInput:
    """What experts and routers read one tensor with, as one matrix.

    Args:
        shared: the sites that read the tensor.
        routers: routers by mixture; those that read the tensor too are packed with the experts.
        dtype: of the hidden states.
    """

    def __init__(self, shared: SharedInput, routers: Mapping[str, Router], dtype: torch.dtype) -> None:
        self.shared = shared
        self.routers = [(name, routers[name]) for name in shared.routers]
        self.at_site = False
        self.by_core = [(name, routers[name]) for name in shared.routed_by_core]
        reads = list(dict.fromkeys(linear for _, router in self.routers for linear in router.reads()))
        self.weight, self.bias = read_matrix([*shared.linears(), *reads], dtype)
        self.sizes = [sum(part.rank for part in shared.parts), *(linear.out_features for linear in reads)]
        # Which of the products each router needs.
        self.numbers = [[reads.index(linear) for linear in router.reads()] for _, router in self.routers]
        self.spread = shared.spread_matrix(dtype, self.weight.device)
        rank = self.sizes[0]
        self.experts_only = self.weight[:rank], None if self.bias is None else self.bias[:rank]


class DecodingStep:
    """One adapter in one block while it decodes.

    Args:
        mixtures: the adapter; all its sites are products.
        routers: its routers by mixture.
        owned: sites whose output may be changed in place.
        dtype: of the hidden states.
    """

    def __init__(
        self, mixtures: BlockMixtures, routers: Mapping[str, Router], *, owned: frozenset[Site], dtype: torch.dtype
    ) -> None:
        layout = mixtures.shared
        self.owned = owned
        self.dtype = dtype
        self.input_of = layout.input_of
        self.router_at = layout.router_at
        self.inputs = {name: _PackedInput(shared, routers, dtype) for name, shared in layout.inputs.items()}
        for packed in self.inputs.values():
            packed.at_site = any(mixtures.mixtures[name].is_at_site for name, _ in packed.routers)
        self.writes = {site: columns(product.writes(), dtype).t() for site, product in mixtures.products.items()}
        # What the block's router alone weighs gets its scales from one product.
        together = [name for name, packed in self.inputs.items() if packed.shared.sources == (BLOCK,)]
        self.together = tuple(together)
        self.spread = torch.cat([self.inputs[name].spread for name in together], dim=1) if together else None
        self.spread_sizes = [self.inputs[name].spread.shape[1] for name in together]


class RunningStep:
    """A decoding step of one block that runs.

    Args:
        step: what was prepared.
        routings: the routings of the call by mixture.
        keep: hands a new routing to the layer, which also enters it in `routings`.
    """

    def __init__(self, step: DecodingStep, routings: Mapping[str, Routing], keep: KeepRouting) -> None:
        self.step = step
        self.routings = routings
        self.keep = keep
        self.scales: dict[str, torch.Tensor] = {}
        self.weights: torch.Tensor | None = None
        self.read: dict[str, tuple[torch.Tensor, dict[Site, torch.Tensor]]] = {}

    def enter(self, name: str, x: torch.Tensor, *, with_block: bool = False) -> dict[Site, torch.Tensor]:
        """The weighted inner activations of all sites that read `x`; routers that read it route.

        Args:
            name: what is read.
            x: ``[B, 1, in]``.
            with_block: whether `x` is what the router of the block, or of the MLP, reads.
        """
        packed = self.step.inputs[name]
        flat = x.reshape(-1, x.shape[-1])
        if packed.routers and (with_block or packed.at_site):
            z, *products = F.linear(x, packed.weight, packed.bias).split(packed.sizes, dim=-1)
            z = z.reshape(flat.shape[0], -1)
            for (mixture, router), numbers in zip(packed.routers, packed.numbers):
                own = [products[number] for number in numbers]
                self.keep(mixture, router.route(own) if own else router(x))
        else:
            z = F.linear(flat, *packed.experts_only)
        for mixture, router in packed.by_core:
            self.keep(mixture, router(packed.shared.read_of(mixture, z).reshape(*x.shape[:-1], -1)))
        scales, weights = self._scales(name, packed, z)
        inner = packed.shared.scaled(z, scales, weights)
        self.read[name] = (x, inner)
        return inner

    def _scales(self, name: str, packed: _PackedInput, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in self.step.together:
            weights = packed.shared.weights(self.routings, z)
            return weights @ packed.spread, weights
        if self.weights is None:
            weights = self.routings[BLOCK].weights
            self.weights = weights.reshape(-1, weights.shape[-1]).to(self.step.dtype)
            assert self.step.spread is not None
            pieces = (self.weights @ self.step.spread).split(self.step.spread_sizes, dim=-1)
            self.scales = dict(zip(self.step.together, pieces))
        return self.scales[name], self.weights

    def add(self, site: Site, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`output` plus what the experts of a site make of `x`."""
        step = self.step
        name = step.input_of[site]
        held = self.read.get(name)
        inner = held[1][site] if held is not None and held[0] is x else self.enter(name, x)[site]
        width = output.shape[-1]
        if site in step.owned and output.dtype == inner.dtype:
            output.view(-1, width).addmm_(inner, step.writes[site])
            return output
        flat = output.reshape(-1, width)
        return torch.addmm(flat, inner.to(flat.dtype), step.writes[site].to(flat.dtype)).view(output.shape)
