"""The fused path of one block: shared products for the experts, and with them for the router.

It is taken wherever nothing stands in its way, and the plain path (each expert's own forward) everywhere else; they
are equal in value and gradient. `FusedPath.obstacles` tells which parts of a block take which, and why.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moa_peft.architectures import ATTENTION_INPUT
from moa_peft.call import Call
from moa_peft.decoding import DecodingStep
from moa_peft.functional import linear
from moa_peft.initialization import MasterLinear
from moa_peft.mixture import Layout
from moa_peft.mlp import MLP_SITE, MLPSite, install_fused_mlp, uninstall_fused_mlp
from moa_peft.packed import columns, has_backward, is_transformed, read, read_matrix
from moa_peft.plan import Site, submodule
from moa_peft.products import SharedInput, add_product, has_global_hooks, is_plain
from moa_peft.prompt_addition import PromptState, recomputed_with_prompts, with_prompts
from moa_peft.routers import Router
from moa_peft.routing import Routing

if TYPE_CHECKING:
    from moa_peft.layer import MoALayer

SWITCHED_OFF = "switched off"

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
    """

    def __init__(self, layer: "MoALayer") -> None:
        self.layer = layer
        self.enabled = True
        self._mlp: nn.Module | None = None

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
            self._mlp = modules[0]
            assert self._mlp is not None
            install_fused_mlp(self._mlp, MLPSite(self, architecture))

    def uninstall(self) -> None:
        """Give the MLP its own class back."""
        if self._mlp is not None:
            uninstall_fused_mlp(self._mlp)

    # Routing and sites

    def route(self, call: Call, adapter_name: str, hidden: torch.Tensor) -> bool:
        """Route together with the experts that read what the router reads; False where that is not possible."""
        step = self._decoding_step(call, adapter_name, hidden)
        if step is not None and step.router_sizes:
            routing, z = step.route(hidden)
            self.layer.keep_routing(call, adapter_name, routing)
            running = call.steps[adapter_name] = step.start(routing)
            running.weigh(step.inputs[ATTENTION_INPUT], hidden, z)
            return True
        shared = self._layout(adapter_name, hidden).inputs.get(ATTENTION_INPUT)
        if shared is None or self._routing_obstacle(adapter_name, shared):
            return False
        router = self._router(adapter_name)
        experts, reads = shared.linears(), router.reads()
        z = self._product(call, shared, [*experts, *reads], hidden)
        z, *products = z.split([sum(_widths(experts)), *_widths(reads)], dim=-1)
        routing = router.route(products)
        self.layer.keep_routing(call, adapter_name, routing)
        self._weight(call, adapter_name, shared, hidden, z, routing)
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
        mixture = self.layer.mixtures[adapter_name]
        product = mixture.products.get(site)
        if product is None or not self.enabled:
            return None
        running = call.steps.get(adapter_name)
        if running is None:
            step = self._decoding_step(call, adapter_name, x)
            if step is not None:
                running = call.steps[adapter_name] = step.start(call.routings[adapter_name])
        if running is not None:
            return running.add(site, x, output)
        layout = self._layout(adapter_name, x)
        shared = layout.read_by(site)
        held = call.shared.get((adapter_name, shared.name))
        index = None
        if held is None or not _same(held[0], x):
            if shared.obstacle():
                return None
            routing = call.routings[adapter_name]
            if site in layout.alone:
                index = product.active_tokens(routing.weights)
                if len(index) > SKIP_SHARE[x.device.type] * (x.numel() // x.shape[-1]):
                    index = None
            z = self._product(call, shared, shared.linears(), x, index)
            held = self._weight(call, adapter_name, shared, x, z, routing, index)
        parts = product.writes()
        write = parts if has_backward() else columns(parts, output.dtype)
        return add_product(output, held[1][site], write, in_place=self._owns_output(module), index=index)

    def _decoding_step(self, call: Call, adapter_name: str, x: torch.Tensor) -> DecodingStep | None:
        """The prepared step of a generation; None where there is none, or something stands in its way."""
        if not call.decoding or not self.enabled or torch.is_autocast_enabled(x.device.type):
            return None
        mixture, router = self.layer.mixtures[adapter_name], self._router(adapter_name)

        def make() -> DecodingStep | None:
            sites = mixture.linear_sites
            if not sites or len(sites) > len(mixture.products):
                return None
            if any(shared.obstacle() for shared in mixture.shared.inputs.values()):
                return None
            shared = mixture.shared.inputs.get(ATTENTION_INPUT)
            with_router = self._routing_obstacle(adapter_name, shared) is None
            block = self.layer.get_base_layer()
            owned = frozenset(site for site in sites if self._owns_output(block.get_submodule(site[1])))
            return DecodingStep(mixture, router, with_router=with_router, owned=owned, dtype=x.dtype)

        key = ("step", adapter_name, self.layer.training, x.dtype)
        witness = router.reads()[0].weight
        return call.once_per_generation(key, witness, make, lambda: mixture.parameters(router))

    def _layout(self, adapter_name: str, x: torch.Tensor | None = None) -> Layout:
        """Which sites share a product in this forward, or in one over many tokens like `x`."""
        mixture = self.layer.mixtures[adapter_name]
        if mixture.skipping is mixture.shared or torch.compiler.is_compiling() or is_transformed():
            return mixture.shared
        if x is not None and type(x) is not torch.Tensor:
            return mixture.shared
        if x is not None and (x.device.type not in SKIP_SHARE or x.numel() < SKIP_TOKENS * x.shape[-1]):
            return mixture.shared
        skips = self._router(adapter_name).may_skip(with_gradient=torch.is_grad_enabled())
        return mixture.skipping if skips else mixture.shared

    def _product(
        self,
        call: Call,
        shared: SharedInput,
        linears: Sequence[MasterLinear],
        x: torch.Tensor,
        index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if has_backward():
            return read(x, linears, index)
        if index is not None:
            x = x.reshape(-1, x.shape[-1]).index_select(0, index)
        return linear(x, *read_matrix(linears, x.dtype))

    def _weight(
        self,
        call: Call,
        adapter_name: str,
        shared: SharedInput,
        x: torch.Tensor,
        z: torch.Tensor,
        routing: Routing,
        index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[Site, torch.Tensor]]:
        weights = routing.weights
        if index is not None:
            weights = weights.reshape(-1, weights.shape[-1]).index_select(0, index)
        elif weights.dim() != z.dim():
            weights = weights.reshape(*z.shape[:-1], weights.shape[-1])
        held = (x, shared.weighted(z, weights))
        if index is None:
            call.shared[adapter_name, shared.name] = held
        return held

    def _router(self, adapter_name: str) -> Router:
        router = self.layer.moa_router[adapter_name]
        assert isinstance(router, Router)
        return router

    # Attention

    def add_prompt(
        self, attended: torch.Tensor, query: torch.Tensor, states: Sequence[PromptState], scaling: float
    ) -> torch.Tensor:
        """What attention returned plus its prompt experts; see `moa_peft.prompt_addition` for the arguments."""
        call = self.layer.calls.current()
        listened = not all(isinstance(state.expert, nn.Module) and is_plain(state.expert) for state in states)
        if call is None or not self.enabled or not has_backward() or listened:
            return with_prompts(attended, query, states, scaling)
        path = self.layer.architecture.roles.get("o", "")
        name, *others = call.routings
        mixture = self.layer.mixtures[name]
        product = None if others or not attended.is_contiguous() else mixture.products.get((path, path))
        layout = self._layout(name, attended.flatten(-2))
        if product is None or product.obstacle() or product.read_biased or product.site in layout.alone:
            return recomputed_with_prompts(attended, query, states, scaling, [])[0]
        shared = layout.read_by(product.site)
        reads = [module.weight for module in shared.linears()]
        total, z = recomputed_with_prompts(attended, query, states, scaling, reads)
        assert z is not None
        self._weight(call, name, shared, total, z, call.routings[name])
        return total

    # The MLP

    def mlp_obstacle(self, site: Site, down: nn.Module, adapter_names: Iterable[str]) -> str | None:
        """Why the MLP takes the model's own forward while these adapters act; None where it is fused."""
        if not self.enabled:
            return SWITCHED_OFF
        if not self.listens_alone(down):
            return "another hook listens to the down projection"
        for name in adapter_names:
            mixture = self.layer.mixtures[name]
            if mixture.at(site):
                product = mixture.products.get(site)
                if product is None or product.biased or product.read_biased or product.activated:
                    return "an expert of the down projection is no plain product of two matrices"
                if product.obstacle():
                    return product.obstacle()
        return None

    def down_factors(
        self, call: Call, site: Site, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
        """The experts of the down projection, as the last three arguments of `moa_peft.glu.gated_down`."""
        reads: list[torch.Tensor] = []
        writes: list[torch.Tensor] = []
        scales = []
        for name, routing in call.routings.items():
            mixture = self.layer.mixtures[name]
            if site in mixture.products:
                shared = mixture.shared.read_by(site)
                reads += [module.weight for module in shared.linears()]
                writes += mixture.products[site].writes()
                scales.append(shared.spread(routing.weights.to(dtype)))
        if not scales:
            return [], [], None
        return reads, writes, scales[0] if len(scales) == 1 else torch.cat(scales, dim=-1)

    # What stands in the way

    def obstacles(self, adapter_name: str) -> dict[str, str | None]:
        """The parts of one adapter in this block, and why each takes the plain path; None where it takes this one."""
        mixture = self.layer.mixtures[adapter_name]
        together = self._layout(adapter_name).inputs.get(ATTENTION_INPUT)
        found: dict[str, str | None] = {"router": self._routing_obstacle(adapter_name, together)}
        for slot in mixture.slots:
            if slot.expert_type == "prompt":
                expert = self.layer.moa_experts[adapter_name].get_submodule(slot.name)
                listened = None if is_plain(expert) else "a hook listens to the expert"
                found[slot.name] = listened if self.enabled else SWITCHED_OFF
            elif slot.modules not in mixture.products:
                found[slot.name] = "experts of its site are no products of two linear layers"
            else:
                shared = self._layout(adapter_name).read_by(slot.modules)
                found[slot.name] = shared.obstacle() if self.enabled else SWITCHED_OFF
        site = None if self._mlp is None else self._mlp.__dict__[MLP_SITE]
        found["mlp"] = "it is not down(act(gate) * up)" if site is None else site.obstacle([adapter_name])
        return found

    def skipping(self, adapter_name: str) -> frozenset[str]:
        """Names of the experts that leave out tokens without a weight, where these are many enough."""
        mixture = self.layer.mixtures[adapter_name]
        alone = self._layout(adapter_name).alone if self.enabled else frozenset()
        site = None if self._mlp is None else self._mlp.__dict__[MLP_SITE]
        if site is not None and torch.is_grad_enabled() and site.obstacle([adapter_name]) is None:
            # The fused MLP reads and adds to every token.
            alone -= {site.down_site}
        obstacles = self.obstacles(adapter_name)
        return frozenset(s.name for s in mixture.slots if s.modules in alone and obstacles[s.name] is None)

    def _routing_obstacle(self, adapter_name: str, shared: SharedInput | None) -> str | None:
        mixture = self.layer.mixtures[adapter_name]
        if not self.enabled:
            return SWITCHED_OFF
        normed = mixture.router_input == "normed" and self.layer.norm_name is not None
        if not normed or mixture.granularity != "token" or shared is None:
            return "it reads something that no expert reads"
        router = self._router(adapter_name)
        if not (is_plain(router) and all(is_plain(module) for module in router.reads())):
            return "a hook listens to the router, or keeps its weights elsewhere"
        return shared.obstacle()

    def _owns_output(self, module: nn.Module) -> bool:
        """Whether a module's output is a fresh tensor that nobody else has seen."""
        site = module.__dict__.get(MLP_SITE)
        if site is not None and not self._owns_output(site.parts()[-1]):
            # An MLP returns what its down projection returned.
            return False
        return (type(module) is nn.Linear or site is not None) and self.listens_alone(module)

    def listens_alone(self, module: nn.Module) -> bool:
        """Whether no hook but this layer's listens to a module of the block."""
        own = module.__dict__
        if has_global_hooks() or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if "_hf_hook" in own or "forward" in own:
            return False
        return all(
            getattr(getattr(hook, "func", hook), "__self__", None) is self.layer
            for hook in (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
        )


def _same(read: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `x` is what was read, or the same memory in another shape (heads side by side)."""
    if read is x:
        return True
    if torch.compiler.is_compiling() or read.dim() != x.dim() + 1 or read.numel() != x.numel():
        return False
    if read.dtype != x.dtype or read.requires_grad != x.requires_grad:
        return False
    return read.data_ptr() == x.data_ptr() and read.is_contiguous() and x.is_contiguous()


def _widths(linears: Sequence[MasterLinear]) -> list[int]:
    return [module.out_features for module in linears]
