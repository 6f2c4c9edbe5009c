"""The fused path of one block: shared products for the experts, and with them for the router.

It is taken wherever nothing stands in its way, and the plain path (each expert's own forward) everywhere else; they
are equal in value and gradient. `moa_peft.obstacles` tells which parts of a block take which, and why.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from moa_peft.call import Call
from moa_peft.decoding import DecodingStep, RunningStep
from moa_peft.experts import PromptExpert
from moa_peft.functional import linear
from moa_peft.initialization import MasterLinear
from moa_peft.listeners import is_plain
from moa_peft.mixture import Layout
from moa_peft.mlp import MLPSite, install_fused_mlp, uninstall_fused_mlp
from moa_peft.obstacles import owns_output, routing_obstacle, site_obstacle
from moa_peft.packed import by_layer, columns, has_backward, is_transformed, read, read_dropped, read_matrix
from moa_peft.products import SharedInput, SiteProduct, add_product, is_same_tensor
from moa_peft.prompt_addition import (
    PromptState,
    fold,
    product_dtype,
    recomputed_with_prompts,
    summed_with_prompts,
    with_prompts,
)
from moa_peft.routers import Router
from moa_peft.sites import Site, submodule

if TYPE_CHECKING:
    from moa_peft.layer import MoALayer

Held = tuple[torch.Tensor, dict[Site, torch.Tensor]]
"""What was read, and the weighted inner activations of every site that reads it."""

EMPTY: Mapping[MasterLinear, torch.Tensor] = {}

GatedDown = Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
"""`moa_peft.glu.gated_down` from its argument `reads` on."""

SKIP_SHARE = {"cpu": 0.6}
"""By device: up to this share of tokens with a weight, a large site reads and adds to these alone. Measured with
``python -m benchmarks scaling``; on a device that is not here every token takes part."""

SKIP_TOKENS = 64
"""Forwards over fewer tokens leave none out."""


class FusedPath:
    """The fused path of one tuner layer.

    Args:
        layer: the layer.

    Attributes:
        enabled: False sends everything down the plain path.
        mlp: the block's MLP where it is fused, or None.
    """

    def __init__(self, layer: "MoALayer") -> None:
        self.layer = layer
        self.enabled = True
        self.mlp: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedPath":
        # Together with its layer; see there.
        layer = copy.deepcopy(self.layer, memo)
        if layer is self.layer or id(self) in memo:
            return memo.get(id(self), self)
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update({key: copy.deepcopy(value, memo) for key, value in vars(self).items()})
        return twin

    def install(self) -> None:
        """Fuse the MLP of the block, where the architecture says that it can be."""
        architecture = self.layer.architecture
        names = [
            architecture.mlp,
            architecture.glu,
            *(architecture.roles.get(role) for role in ("gate", "up", "down")),
        ]
        modules = [submodule(self.layer.get_base_layer(), name) for name in names if isinstance(name, str)]
        if len(modules) == len(names) and all(modules):
            self.mlp = modules[0]
            assert self.mlp is not None
            install_fused_mlp(self.mlp, MLPSite(self, architecture))

    def uninstall(self) -> None:
        """Give the MLP its own class back."""
        if self.mlp is not None:
            uninstall_fused_mlp(self.mlp)

    # Routing and sites

    def route(self, call: Call, adapter_name: str, mixture: str, hidden: torch.Tensor) -> bool:
        """Route the block's or the MLP's mixture together with the experts that read what its router reads; False
        where that is not possible.
        """
        running = self._running_step(call, adapter_name, hidden)
        if running is not None and mixture in running.step.router_at:
            running.enter(running.step.router_at[mixture], hidden, with_block=True)
            return True
        layout = self.layout(adapter_name, hidden)
        if routing_obstacle(self.layer, adapter_name, mixture, layout):
            return False
        shared = layout.inputs[layout.router_at[mixture]]
        self._enter(call, adapter_name, shared, hidden, (mixture, *self._routers_at(adapter_name, shared)))
        return True

    def add(
        self, call: Call, adapter_name: str, site: Site, module: nn.Module, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor | None:
        """`output` plus what the experts of a site make of `x`; None where they take the plain path.

        Args:
            call: the running call.
            adapter_name: whose experts.
            site: where.
            module: the module whose output it is.
            x: ``[.., in]`` what the site reads.
            output: ``[.., out]``; it may be changed in place.
        """
        product = self.layer.mixtures[adapter_name].products.get(site)
        if product is None or not self.enabled:
            return None
        running = self._running_step(call, adapter_name, x)
        if running is not None:
            return running.add(site, x, output)
        layout = self.layout(adapter_name, x)
        shared = layout.read_by(site)
        held = call.shared.get((adapter_name, shared.name))
        in_place = owns_output(self.layer, module)
        if held is not None and not is_same_tensor(held[0], x):
            # This site reads another tensor than those before it: it reads, and its own router routes, by itself.
            shared, held = shared.by_site[site], None
        if held is None:
            if site_obstacle(self.layer, adapter_name, shared):
                return None
            if site in layout.alone:
                self._route_at(call, adapter_name, shared, x)
                gathered = self._add_gathered(call, adapter_name, shared, x, output, in_place=in_place)
                if gathered is not None:
                    return gathered
            held = self._enter(call, adapter_name, shared, x, self._routers_at(adapter_name, shared))
        return add_product(output, held[1][site], _writes(product, output), in_place=in_place)

    def _add_gathered(
        self,
        call: Call,
        adapter_name: str,
        shared: SharedInput,
        x: torch.Tensor,
        output: torch.Tensor,
        *,
        in_place: bool,
    ) -> torch.Tensor | None:
        """`output` plus what every expert of one site makes of the tokens for which it has a weight; None where these
        are so many that all tokens together are faster.
        """
        routings = call.routings[adapter_name]
        reads = [(single, single.active_tokens(single.weights(routings, x))) for single in shared.singles]
        kept = sum(len(index) * single.products[0].rank for single, index in reads)
        tokens = x.numel() // x.shape[-1]
        if kept > SKIP_SHARE[x.device.type] * tokens * shared.products[0].rank:
            return None
        read_x = F.dropout(x, shared.dropout) if shared.drops else x
        for single, index in reads:
            z = self._read(read_x, single.linears(), index)
            weights = single.weights(routings, x).reshape(tokens, -1).index_select(0, index).to(z.dtype)
            (product,) = single.products
            inner = single.weighted(z, weights)[product.site]
            output = add_product(output, inner, _writes(product, output), in_place=in_place, index=index)
        return output

    def _running_step(self, call: Call, adapter_name: str, x: torch.Tensor) -> RunningStep | None:
        """The adapter's step in a forward over one more token; None where it has to be decided and packed anew."""
        running = call.steps.get(adapter_name)
        if running is None:
            step = self._decoding_step(call, adapter_name, x)
            if step is not None:
                keep = partial(self.layer.keep_routing, call, adapter_name)
                running = call.steps[adapter_name] = RunningStep(step, call.routings[adapter_name], keep)
        return running

    def _decoding_step(self, call: Call, adapter_name: str, x: torch.Tensor) -> DecodingStep | None:
        """The prepared step of a generation; None where there is none, or something stands in its way."""
        if not call.decoding or not self.enabled or torch.is_autocast_enabled(x.device.type):
            return None
        mixtures = self.layer.mixtures[adapter_name]
        if not mixtures.linears:
            return None

        def make() -> DecodingStep | None:
            sites, routers = mixtures.linear_sites, self.layer.routers(adapter_name)
            if not sites or len(sites) > len(mixtures.products):
                return None
            if any(shared.obstacle() or shared.drops for shared in mixtures.shared.inputs.values()):
                return None
            layout = mixtures.shared
            if any(routing_obstacle(self.layer, adapter_name, name, layout) for name in layout.router_at):
                return None
            block = self.layer.get_base_layer()
            owned = frozenset(site for site in sites if owns_output(self.layer, block.get_submodule(site[1])))
            return DecodingStep(mixtures, routers, owned=owned, dtype=x.dtype)

        key = ("step", adapter_name, self.layer.training, x.dtype)
        return call.once_per_generation(
            key, mixtures.witness, make, lambda: mixtures.parameters(self.layer.routers(adapter_name))
        )

    def layout(self, adapter_name: str, x: torch.Tensor | None = None) -> Layout:
        """Which sites share a product in this forward, or in one over many tokens like `x`."""
        mixtures = self.layer.mixtures[adapter_name]
        if mixtures.skipping is mixtures.shared or torch.compiler.is_compiling() or is_transformed():
            return mixtures.shared
        if x is not None and type(x) is not torch.Tensor:
            return mixtures.shared
        if x is not None and (x.device.type not in SKIP_SHARE or x.numel() < SKIP_TOKENS * x.shape[-1]):
            return mixtures.shared
        routers = self.layer.routers(adapter_name).values()
        skips = all(router.may_skip(with_gradient=torch.is_grad_enabled()) for router in routers)
        return mixtures.skipping if skips else mixtures.shared

    def _routers_at(self, adapter_name: str, shared: SharedInput) -> tuple[str, ...]:
        """The routers that read a shared input because their site does."""
        mixtures = self.layer.mixtures[adapter_name].mixtures
        return tuple(name for name in shared.routers if mixtures[name].is_at_site)

    def _route_at(self, call: Call, adapter_name: str, shared: SharedInput, x: torch.Tensor) -> None:
        """Route the mixtures whose routers read a shared input at their site, before their experts read it."""
        for name in self._routers_at(adapter_name, shared):
            router = self.layer.routers(adapter_name)[name]
            self.layer.keep_routing(call, adapter_name, name, router(x))
            call.routed_from[adapter_name, name] = x

    def _enter(
        self, call: Call, adapter_name: str, shared: SharedInput, x: torch.Tensor, routed: Sequence[str]
    ) -> Held:
        """What the experts at a shared input read and weigh.

        Args:
            call: the running call.
            adapter_name: whose experts.
            shared: the sites that read `x`.
            x: ``[.., in]``.
            routed: the mixtures whose routers read `x`; those that have done so do not again.
        """
        routers = self.layer.routers(adapter_name)
        pending = [name for name in routed if call.routed_from.get((adapter_name, name)) is not x]
        router_reads = [(name, routers[name], routers[name].reads()) for name in pending]
        linears = shared.linears()
        reads = list(dict.fromkeys(linear for _, _, own in router_reads for linear in own))
        if reads and not shared.drops:
            rank = sum(linear.out_features for linear in linears)
            product = self._read(x, [*linears, *reads])
            z, product = product.split([rank, product.shape[-1] - rank], dim=-1)
        else:
            z = self._read(x, linears, dropout=shared.dropout if shared.drops else 0.0)
            product = self._read(x, reads) if reads else z
        products = by_layer(product, reads) if reads else {}
        return self._weigh(call, adapter_name, shared, x, z, router_reads, products)

    def _weigh(
        self,
        call: Call,
        adapter_name: str,
        shared: SharedInput,
        x: torch.Tensor,
        z: torch.Tensor,
        router_reads: Sequence[tuple[str, Router, list[MasterLinear]]] = (),
        products: Mapping[MasterLinear, torch.Tensor] = EMPTY,
    ) -> Held:
        """The rest of `_enter`: `z` is what the experts read from `x`, `products` what the routers did."""
        for name, router, own in router_reads:
            routing = router.route([products[linear] for linear in own]) if own else router(x)
            self.layer.keep_routing(call, adapter_name, name, routing)
            call.routed_from[adapter_name, name] = x
        for name in shared.routed_by_core:
            routing = self.layer.routers(adapter_name)[name](shared.read_of(name, z))
            self.layer.keep_routing(call, adapter_name, name, routing)
        weights = shared.weights(call.routings[adapter_name], z)
        held = call.shared[adapter_name, shared.name] = (x, shared.weighted(z, weights))
        return held

    def _read(
        self,
        x: torch.Tensor,
        linears: Sequence[MasterLinear],
        index: torch.Tensor | None = None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        if has_backward():
            return read_dropped(x, linears, dropout) if dropout else read(x, linears, index)
        x = F.dropout(x, dropout) if dropout else x
        if index is not None:
            x = x.reshape(-1, x.shape[-1]).index_select(0, index)
        return linear(x, *read_matrix(linears, x.dtype))

    # Attention

    def add_prompt(
        self, attended: torch.Tensor, query: torch.Tensor, states: Sequence[PromptState], scaling: float
    ) -> torch.Tensor:
        """What attention returned plus its prompt experts; see `moa_peft.prompt_addition` for the arguments."""
        call = self.layer.calls.current()
        listened = not all(isinstance(state.expert, nn.Module) and is_plain(state.expert) for state in states)
        if call is None or not self.enabled or listened or torch.compiler.is_compiling() or is_transformed():
            return with_prompts(attended, query, states, scaling)
        if not torch.is_grad_enabled():
            if not all(type(state.expert) is PromptExpert for state in states):
                return with_prompts(attended, query, states, scaling)
            prompts = [(*self._folded(call, state, query, scaling), state.weight_BT1) for state in states]
            return summed_with_prompts(attended, query, prompts)
        path = self.layer.architecture.roles.get("o", "")
        name, *others = call.running
        product = self.layer.mixtures[name].products.get((path, path))
        layout = self.layout(name, attended.flatten(-2))
        if product is None or others or product.obstacle() or product.read_biased or product.drops:
            return recomputed_with_prompts(attended, query, states, scaling, [])[0]
        shared = layout.read_by(product.site)
        routed_here = shared.routers or shared.routed_by_core
        if routed_here or not attended.is_contiguous() or product.site in layout.alone:
            return recomputed_with_prompts(attended, query, states, scaling, [])[0]
        reads = [module.weight for module in shared.linears()]
        total, z = recomputed_with_prompts(attended, query, states, scaling, reads)
        assert z is not None
        self._weigh(call, name, shared, total, z)
        return total

    def _folded(
        self, call: Call, state: PromptState, query: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`fold`, once per generation: keys and values are made anew when the embedding changes."""
        gate: torch.Tensor = state.expert.gate  # type: ignore[attr-defined]
        dtype = product_dtype(query)
        return call.once_per_generation(
            ("folded prompt", id(gate), dtype, scaling),
            state.key_HPK,
            lambda: fold(state.key_HPK, state.value_HPK, gate, scaling, dtype),
            lambda: [gate, state.key_HPK, state.value_HPK],
        )

    # The MLP

    def add_down(self, call: Call, site: Site, gated_down: GatedDown) -> torch.Tensor:
        """The output of a fused MLP plus what the experts of its down projection add.

        Args:
            call: the running call.
            site: the down projection.
            gated_down: `moa_peft.glu.gated_down`, but for the matrices that read what the down projection reads.
        """
        reading, linears, dropping = [], [], []
        dropout = 0.0
        for name in call.running:
            mixtures = self.layer.mixtures[name]
            if site in mixtures.products:
                shared = mixtures.shared.read_by(site)
                routers = [(n, self.layer.routers(name)[n]) for n in self._routers_at(name, shared)]
                router_reads = [(n, router, router.reads()) for n, router in routers]
                reading.append((name, mixtures.products[site], shared, router_reads))
                (dropping if shared.drops else linears).extend(shared.linears())
                linears += [linear for *_, own in router_reads for linear in own]
                dropout = shared.dropout if shared.drops else dropout
        linears = list(dict.fromkeys(linears))
        output, read_h, read_dropped_h = gated_down(
            [linear.weight for linear in linears], [linear.weight for linear in dropping], dropout
        )
        products: dict[MasterLinear, torch.Tensor] = {}
        if read_h is not None:
            bias = read_matrix(linears, read_h.dtype)[1]
            products |= by_layer(read_h if bias is None else read_h + bias, linears)
        if read_dropped_h is not None:
            products |= by_layer(read_dropped_h, dropping)
        for name, product, shared, router_reads in reading:
            pieces = [products[linear] for linear in shared.linears()]
            z = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
            held = self._weigh(call, name, shared, output, z, router_reads, products)
            output = add_product(output, held[1][product.site], product.writes(), in_place=True)
        return output


def _writes(product: SiteProduct, output: torch.Tensor) -> torch.Tensor | Sequence[torch.Tensor]:
    """What a site's experts write with: the parts, or, where our own backward passes serve nobody, their matrix."""
    parts = product.writes()
    return parts if has_backward() else columns(parts, output.dtype)
