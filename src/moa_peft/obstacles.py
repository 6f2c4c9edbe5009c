"""What stands in the way of the fused path, part by part."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from moa_peft.experts import EXPERTS
from moa_peft.listeners import is_plain, listens_alone
from moa_peft.mixture import Layout
from moa_peft.mlp import MLP_SITE, SWITCHED_OFF
from moa_peft.products import SharedInput
from moa_peft.sites import BLOCK

if TYPE_CHECKING:
    from moa_peft.layer import MoALayer


def obstacles(layer: "MoALayer", adapter_name: str) -> dict[str, str | None]:
    """The parts of one adapter in this block, and why each takes the plain path; None where it takes this one."""
    mixtures = layer.mixtures[adapter_name]
    layout = layer.fused_path.layout(adapter_name)
    routers = layer.routers(adapter_name)
    found: dict[str, str | None] = {}
    for name in routers:
        label = "router" if name == BLOCK else f"router {name}"
        found[label] = routing_obstacle(layer, adapter_name, name, layout)
    for slot in mixtures.slots:
        kind = EXPERTS[slot.expert_type].site_kind
        if kind in ("attention", "gated_mlp"):
            expert = layer.moa_experts[adapter_name].get_submodule(slot.name)
            listened = None if is_plain(expert) else "a hook listens to the expert"
            found[slot.name] = listened if layer.fused_path.enabled else SWITCHED_OFF
        elif slot.modules not in mixtures.products:
            found[slot.name] = "experts of its site are no products of two linear layers"
        else:
            found[slot.name] = layout.read_by(slot.modules).obstacle() if layer.fused_path.enabled else SWITCHED_OFF
    site = None if layer.fused_path.mlp is None else layer.fused_path.mlp.__dict__[MLP_SITE]
    found["mlp"] = "it is not down(act(gate) * up)" if site is None else site.obstacle([adapter_name])
    return found


def skipping(layer: "MoALayer", adapter_name: str) -> frozenset[str]:
    """Names of the experts that leave out tokens without a weight, where these are many enough."""
    mixtures = layer.mixtures[adapter_name]
    alone = layer.fused_path.layout(adapter_name).alone if layer.fused_path.enabled else frozenset()
    site = None if layer.fused_path.mlp is None else layer.fused_path.mlp.__dict__[MLP_SITE]
    if site is not None and torch.is_grad_enabled() and site.obstacle([adapter_name]) is None:
        # The fused MLP reads and adds to every token.
        alone -= {site.down_site}
    standing = obstacles(layer, adapter_name)
    return frozenset(s.name for s in mixtures.slots if s.modules in alone and standing[s.name] is None)


def routing_obstacle(layer: "MoALayer", adapter_name: str, mixture: str, layout: Layout) -> str | None:
    """Why a router does not share a product with the experts that read what it reads; None where it does."""
    if not layer.fused_path.enabled:
        return SWITCHED_OFF
    router = layer.routers(adapter_name)[mixture]
    mixtures = layer.mixtures[adapter_name]
    if mixtures.router_input == "core":
        return None
    post_norm = mixture == BLOCK and layer.norm_name is None
    if mixture not in layout.router_at or post_norm:
        return "it reads something that no expert reads"
    if not (is_plain(router) and all(is_plain(module) for module in router.reads())):
        return "a hook listens to the router, or keeps its weights elsewhere"
    return layout.inputs[layout.router_at[mixture]].obstacle()


def site_obstacle(layer: "MoALayer", adapter_name: str, shared: SharedInput) -> str | None:
    """Why the experts at a shared input, or the routers at their sites, take the plain path; None: they do not."""
    routers = layer.routers(adapter_name)
    for name in shared.routers:
        router = routers[name]
        if not (is_plain(router) and all(is_plain(module) for module in router.reads())):
            return "a hook listens to a router, or keeps its weights elsewhere"
    return shared.obstacle()


def owns_output(layer: "MoALayer", module: nn.Module) -> bool:
    """Whether a module's output is a fresh tensor that nobody else has seen."""
    site = module.__dict__.get(MLP_SITE)
    if site is not None and not owns_output(layer, site.parts()[-1]):
        # An MLP returns what its down projection returned.
        return False
    return (type(module) is nn.Linear or site is not None) and listens_alone(layer, module)
