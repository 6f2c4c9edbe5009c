"""What a tuner layer knows of one adapter besides its tensors."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from moa_peft.architectures import Architecture
from moa_peft.call import Site
from moa_peft.config import MoAConfig
from moa_peft.plan import Slot
from moa_peft.products import SharedInput, SiteProduct


@dataclass(frozen=True, eq=False)
class Mixture:
    """One adapter in one block.

    Attributes:
        slots: its experts, in the order of the routing's columns.
        router_input: ``normed`` or ``residual``.
        granularity: ``token`` or ``sequence``.
        products: sites whose experts are all products of linear layers, see `moa_peft.products`.
        inputs: what these sites read, by name.
        input_of: site to the name of what it reads.
    """

    slots: tuple[Slot, ...]
    router_input: str
    granularity: str
    products: Mapping[Site, SiteProduct]
    inputs: Mapping[str, SharedInput]
    input_of: Mapping[Site, str]

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
            site: SiteProduct(site, members)
            for site, members in sites.items()
            if all(expert.factors() is not None for _, expert in members)
        }
        input_of = {site: architecture.input_of(site[0]) for site in products}
        inputs = {
            name: SharedInput(name, [products[site] for site in products if input_of[site] == name], len(slots))
            for name in dict.fromkeys(input_of.values())
        }
        return cls(slots, config.router_input, config.granularity, products, inputs, input_of)

    def at(self, site: Site) -> list[tuple[int, Slot]]:
        """Columns and slots of the experts at a site."""
        return [(column, slot) for column, slot in enumerate(self.slots) if slot.modules == site]
