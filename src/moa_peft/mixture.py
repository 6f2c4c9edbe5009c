"""What a tuner layer knows of one adapter besides its tensors: its mixtures, and how their experts share products."""

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moa_peft.architectures import ATTENTION_INPUT, Architecture
from moa_peft.config import MoAConfig
from moa_peft.experts import EXPERTS
from moa_peft.initialization import MasterLinear
from moa_peft.products import Part, SharedInput, SiteProduct
from moa_peft.routers import ROUTERS, Router
from moa_peft.sites import BLOCK, MLP, UNROUTED, Site, Slot

SKIP_RANK = 32
"""Experts of at least this rank may leave out tokens, where no smaller one is at their site (docs/performance.md)."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """One router and its experts.

    Attributes:
        name: its name in the block.
        slots: its experts.
        columns: for each of them, its columns in the routing.
    """

    name: str
    slots: tuple[Slot, ...]
    columns: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, name: str, slots: tuple[Slot, ...]) -> "Mixture":
        """The mixture of these experts: a column for each copy, and one for each group."""
        columns: list[tuple[int, ...]] = []
        groups: dict[str, int] = {}
        width = 0
        for slot in slots:
            group = slot.options.group
            if group in groups:
                columns.append((groups[group],))
                continue
            columns.append(tuple(range(width, width + slot.copies)))
            if group is not None:
                groups[group] = width
            width += slot.copies
        return cls(name, slots, tuple(columns))

    @functools.cached_property
    def num_columns(self) -> int:
        """Number E of routing weights."""
        return 1 + max(column for columns in self.columns for column in columns)

    @property
    def is_at_site(self) -> bool:
        """Whether its router reads what the site of its experts reads."""
        return self.name not in (BLOCK, MLP, UNROUTED)

    @property
    def expert_names(self) -> list[str]:
        """What each routing weight belongs to."""
        names: list[list[str]] = [[] for _ in range(self.num_columns)]
        for slot, columns in zip(self.slots, self.columns):
            for number, column in enumerate(columns):
                names[column].append(slot.name if len(columns) == 1 else f"{slot.name}.{number}")
        return [" + ".join(one) for one in names]

    def input_size(self, config: MoAConfig, hidden_size: int) -> int:
        """Width of what its router reads."""
        if config.router_input == "core":
            return self.slots[0].options.rank  # type: ignore[attr-defined]
        return self.slots[0].shape.in_features if self.is_at_site else hidden_size


def mixtures_of(slots: tuple[Slot, ...]) -> dict[str, Mixture]:
    """The mixtures of one adapter in one block, by name."""
    members: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots:
        members[slot.mixture].append(slot)
    return {name: Mixture.of(name, tuple(found)) for name, found in members.items()}


def make_routers(config: MoAConfig, slots: tuple[Slot, ...], hidden_size: int) -> nn.ModuleDict | Router:
    """The routers of one adapter in one block, with weights that are not set yet: by the names of their mixtures, or
    the block's router itself.

    Args:
        config: the configuration.
        slots: its experts in the block.
        hidden_size: width of the residual stream.
    """
    assert config.router is not None
    router_class, options = ROUTERS[config.router["type"]], config.router_options()
    routers = {
        name: router_class(mixture.input_size(config, hidden_size), mixture.num_columns, options)
        for name, mixture in mixtures_of(slots).items()
        if name != UNROUTED
    }
    return routers[BLOCK] if config.scope == "block" and BLOCK in routers else nn.ModuleDict(routers)


@dataclass(frozen=True, eq=False)
class Layout:
    """Which sites share the product that reads their input.

    Attributes:
        inputs: what is read, by name.
        input_of: site to the name of what it reads.
        router_at: mixture to the name of what its router reads, where a product reads that too.
        alone: sites that read for themselves, because they may leave out tokens.
    """

    inputs: Mapping[str, SharedInput]
    input_of: Mapping[Site, str]
    router_at: Mapping[str, str]
    alone: frozenset[Site]

    @classmethod
    def of(
        cls,
        products: Mapping[Site, SiteProduct],
        alone: frozenset[Site],
        mixtures: Mapping[str, Mixture],
        config: MoAConfig,
        architecture: Architecture,
    ) -> "Layout":
        """The layout in which all sites but `alone` share what they can."""
        mlp = architecture.mlp[0] if isinstance(architecture.mlp, list) else architecture.mlp
        wanted = {MLP: architecture.input_of(mlp or "")}
        if config.router_input == "normed" and config.granularity == "token":
            wanted[BLOCK] = ATTENTION_INPUT
        input_of, members, router_at = {}, defaultdict(list), {}
        for site, product in products.items():
            tensor = architecture.input_of(site[0])
            name = tensor if not product.dropout else f"{tensor}, dropout {product.dropout}"
            name = name if site not in alone else f"{name}, {' > '.join(site)} alone"
            input_of[site] = name
            members[name].append(product)
            for mixture in mixtures.values():
                here = any(part.mixture == mixture.name for part in product.parts) if mixture.is_at_site else False
                beside = site not in alone and wanted.get(mixture.name) == tensor
                if beside or (here and config.router_input != "core"):
                    router_at.setdefault(mixture.name, name)
        inputs = {
            name: SharedInput(
                name,
                found,
                widths={m.name: m.num_columns for m in mixtures.values()},
                routers=tuple(mixture for mixture, at in router_at.items() if at == name),
                routed_by_core=config.router_input == "core",
            )
            for name, found in members.items()
        }
        return cls(inputs, input_of, router_at, alone)

    def read_by(self, site: Site) -> SharedInput:
        """What a site reads."""
        return self.inputs[self.input_of[site]]


@dataclass(frozen=True, eq=False)
class BlockMixtures:
    """The mixtures of one adapter in one block.

    Attributes:
        slots: all experts.
        mixtures: by name.
        router_input: see `MoAConfig`.
        granularity: ``token`` or ``sequence``.
        products: sites whose experts are all products of linear layers, see `moa_peft.products`.
        shared: the layout in which all of them share what they read.
        skipping: the layout for forwards in which large sites may leave out tokens.
    """

    slots: tuple[Slot, ...]
    mixtures: Mapping[str, Mixture]
    router_input: str
    granularity: str
    products: Mapping[Site, SiteProduct]
    shared: Layout
    skipping: Layout

    @classmethod
    def of(
        cls, config: MoAConfig, slots: tuple[Slot, ...], experts: nn.ModuleDict, architecture: Architecture
    ) -> "BlockMixtures":
        """The mixtures of a configuration.

        Args:
            config: the configuration.
            slots: its experts in the block.
            experts: the modules of `slots`, by name.
            architecture: what the block calls its parts.
        """
        assert config.router_input is not None
        mixtures = mixtures_of(slots)
        sites: dict[Site, list[Part]] = defaultdict(list)
        others = set()
        for mixture in mixtures.values():
            for slot, columns in zip(mixture.slots, mixture.columns):
                expert = experts.get_submodule(slot.name)
                if EXPERTS[slot.expert_type].site_kind in ("attention", "gated_mlp"):
                    continue
                factors = expert.factors()  # type: ignore[operator]
                if factors is None:
                    others.add(slot.modules)
                else:
                    sites[slot.modules].append(Part(mixture.name, columns, factors, expert))  # type: ignore[arg-type]
        products = {site: SiteProduct(site, parts) for site, parts in sites.items() if site not in others}
        large = frozenset(
            site
            for site, product in products.items()
            if all(part.inner_rank // len(part.columns) >= SKIP_RANK for part in product.parts)
        )
        shared = Layout.of(products, frozenset(), mixtures, config, architecture)
        skipping = Layout.of(products, large, mixtures, config, architecture) if large else shared
        return cls(slots, mixtures, config.router_input, config.granularity, products, shared, skipping)

    @functools.cached_property
    def linear_sites(self) -> frozenset[Site]:
        """The sites of all experts that are neither in attention nor inside the MLP."""
        kinds = ("linear", "mlp")
        return frozenset(slot.modules for slot in self.slots if EXPERTS[slot.expert_type].site_kind in kinds)

    @functools.cached_property
    def gated(self) -> list[tuple[Mixture, tuple[int, ...], Slot]]:
        """The experts inside the MLP, with their mixtures and columns."""
        return self._of_kind("gated_mlp")

    @functools.cached_property
    def prompts(self) -> list[tuple[Mixture, tuple[int, ...], Slot]]:
        """The experts in attention, with their mixtures and columns."""
        return self._of_kind("attention")

    def _of_kind(self, kind: str) -> list[tuple[Mixture, tuple[int, ...], Slot]]:
        return [
            (mixture, columns, slot)
            for mixture in self.mixtures.values()
            for slot, columns in zip(mixture.slots, mixture.columns)
            if EXPERTS[slot.expert_type].site_kind == kind
        ]

    @functools.cached_property
    def linears(self) -> list[MasterLinear]:
        """The linear layers of all products."""
        factors = [part.factors for product in self.products.values() for part in product.parts]
        return [linear for one in factors for linear in (one.read, *one.writes)]

    @property
    def witness(self) -> torch.Tensor:
        """One of the parameters of the products as it is now."""
        return self.linears[0].weight

    def parameters(self, routers: Mapping[str, Router]) -> list[torch.Tensor]:
        """The parameters of `routers` that read what experts read, and those of all products, as they are now."""
        linears = [*self.linears, *(linear for router in routers.values() for linear in router.reads())]
        return [p for linear in linears for p in linear._parameters.values() if p is not None]

    def at(self, site: Site) -> list[tuple[Mixture, tuple[int, ...], Slot]]:
        """The experts at a site, with their mixtures and columns."""
        return [
            (mixture, columns, slot)
            for mixture in self.mixtures.values()
            for slot, columns in zip(mixture.slots, mixture.columns)
            if slot.modules == site
        ]
