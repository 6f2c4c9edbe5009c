"""What a tuner layer knows of one adapter besides its tensors."""

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moa_peft.architectures import Architecture
from moa_peft.config import MoAConfig
from moa_peft.experts import EXPERTS
from moa_peft.initialization import MasterLinear
from moa_peft.plan import Site, Slot
from moa_peft.products import SharedInput, SiteProduct
from moa_peft.routers import Router

SKIP_RANK = 32
"""Sites of at least this rank in all may leave out tokens (docs/performance.md)."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Which sites share the product that reads their input.

    Attributes:
        inputs: what is read, by name.
        input_of: site to the name of what it reads.
        alone: sites that read for themselves, because they may leave out tokens.
    """

    inputs: Mapping[str, SharedInput]
    input_of: Mapping[Site, str]
    alone: frozenset[Site]

    @classmethod
    def of(cls, products: Mapping[Site, SiteProduct], alone: frozenset[Site], architecture: Architecture) -> "Layout":
        """The layout in which all sites but `alone` share what they can."""
        input_of = {site: " > ".join(site) if site in alone else architecture.input_of(site[0]) for site in products}
        inputs = {
            name: SharedInput(name, [products[site] for site in products if input_of[site] == name])
            for name in dict.fromkeys(input_of.values())
        }
        return cls(inputs, input_of, alone)

    def read_by(self, site: Site) -> SharedInput:
        """What a site reads."""
        return self.inputs[self.input_of[site]]


@dataclass(frozen=True, eq=False)
class Mixture:
    """One adapter in one block.

    Attributes:
        slots: its experts, in the order of the routing's columns.
        router_input: ``normed`` or ``residual``.
        granularity: ``token`` or ``sequence``.
        products: sites whose experts are all products of linear layers, see `moa_peft.products`.
        shared: the layout in which all of them share what they read.
        skipping: the layout for forwards in which large sites may leave out tokens.
    """

    slots: tuple[Slot, ...]
    router_input: str
    granularity: str
    products: Mapping[Site, SiteProduct]
    shared: Layout
    skipping: Layout

    @classmethod
    def of(
        cls, config: MoAConfig, slots: tuple[Slot, ...], experts: nn.ModuleDict, architecture: Architecture
    ) -> "Mixture":
        """The mixture of a configuration.

        Args:
            config: the configuration.
            slots: its experts in the block.
            experts: the modules of `slots`, by name.
            architecture: what the block calls its parts.
        """
        sites: dict[Site, list] = defaultdict(list)
        for column, slot in enumerate(slots):
            sites[slot.modules].append((column, experts.get_submodule(slot.name)))
        products = {
            site: SiteProduct(site, members, len(slots))
            for site, members in sites.items()
            if all(expert.factors() is not None for _, expert in members)
        }
        large = frozenset(site for site, product in products.items() if product.rank >= SKIP_RANK)
        shared = Layout.of(products, frozenset(), architecture)
        skipping = Layout.of(products, large, architecture) if large else shared
        return cls(slots, config.router_input, config.granularity, products, shared, skipping)

    @functools.cached_property
    def linear_sites(self) -> frozenset[Site]:
        """The sites of all experts that are not in attention."""
        return frozenset(slot.modules for slot in self.slots if EXPERTS[slot.expert_type].site_kind != "attention")

    def parameters(self, router: Router) -> list[torch.Tensor]:
        """The parameters of `router` that read the hidden state, and those of all products, as they are now."""
        linears = [*self._linears, *router.reads()]
        return [p for linear in linears for p in linear._parameters.values() if p is not None]

    @functools.cached_property
    def _linears(self) -> list[MasterLinear]:
        parts = [factors for product in self.products.values() for _, factors in product.parts]
        return [linear for factors in parts for linear in (factors.read, factors.write)]

    def at(self, site: Site) -> list[tuple[int, Slot]]:
        """Columns and slots of the experts at a site."""
        return [(column, slot) for column, slot in enumerate(self.slots) if slot.modules == site]
