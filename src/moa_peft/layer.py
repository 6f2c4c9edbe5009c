"""The tuner layer: one per block, a child of the block called ``moa``.

It holds the router and the experts of every adapter, routes when the block runs, and adds each expert's output at its
site through hooks on the block's own modules, which stay untouched. Routings live from the start to the end of one
block forward; what a generation may keep lives on its key-value cache (`moa_peft.call`).

Experts act on one of two paths, equal in value and gradient: the plain one, each expert's own forward, and the fused
one of `moa_peft.fused_path`.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moa_peft.architectures import Architecture
from moa_peft.auxiliary import Attachment, Auxiliary
from moa_peft.call import Call, Calls
from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.experts import EXPERTS, PromptExpert
from moa_peft.fused_path import FusedPath
from moa_peft.losses import parse_losses
from moa_peft.mixture import BlockMixtures, Mixture, make_routers
from moa_peft.plan import norm_name
from moa_peft.pooling import Pooling, route_sequences
from moa_peft.prompt_attention import PROMPT_SITE, PromptSite
from moa_peft.routers import Router
from moa_peft.routing import Routing
from moa_peft.sites import BLOCK, MLP, UNROUTED, Site, Slot, submodule


class MoALayer(nn.Module, BaseTunerLayer):
    """Routers and experts of one block.

    Args:
        block: the decoder block; it is not registered as a child.
        architecture: what the block calls its parts.
    """

    # Saving and loading rely on these names: one path component with the prefix, directly before the adapter's name.
    adapter_layer_names = ("moa_router", "moa_experts")
    other_param_names = ("mixtures", "auxiliary")

    def __init__(self, block: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.moa_router = nn.ModuleDict()  # adapter name -> router
        self.moa_experts = nn.ModuleDict()  # adapter name -> expert name -> expert
        self.mixtures: dict[str, BlockMixtures] = {}
        self.architecture = architecture
        self.norm_name = norm_name(architecture, block)
        # Outside the registry of children: the block owns this layer, not the other way round.
        vars(self)["block"] = block
        self.auxiliary = Auxiliary()
        self.calls = Calls()
        self.fused_path = FusedPath(self)
        self.recorder: Callable[[str, str, Routing], None] | None = None
        self._handles: dict[tuple[str, str, str], Any] = {}
        if self.norm_name is not None:
            self._hook("norm", self.norm_name, self.norm_name)
        self.fused_path.install()

    def __deepcopy__(self, memo: dict[int, Any]) -> "MoALayer":
        # PEFT copies single modules of a block (modules_to_save): their hooks go on belonging to this layer. Only with
        # its block is it copied itself.
        if id(self.get_base_layer()) not in memo:
            return self
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update({key: copy.deepcopy(value, memo) for key, value in vars(self).items()})
        return twin

    # Adapters

    def add_mixture(self, adapter_name: str, config: MoAConfig, slots: tuple[Slot, ...], hidden_size: int) -> None:
        """Create the router and the experts of one adapter, with their initial weights."""
        routers = make_routers(config, slots, hidden_size)
        experts = nn.ModuleDict()
        for slot in slots:
            expert = experts[slot.name] = slot.expert()
            expert.reset_parameters(config.init)
        self.moa_router[adapter_name] = routers
        self.moa_experts[adapter_name] = experts
        self.mixtures[adapter_name] = BlockMixtures.of(config, slots, experts, self.architecture)
        for mixture, router in self.routers(adapter_name).items():
            router.reset_parameters(config.init)
            self.auxiliary.add(adapter_name, mixture, parse_losses(config.losses), reduce=config.aux_reduce)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        for slot in slots:
            self._hook(EXPERTS[slot.expert_type].site_kind, *slot.modules)
        if MLP in self.mixtures[adapter_name].mixtures:
            mlp = self.architecture.mlp
            first = mlp[0] if isinstance(mlp, list) else mlp
            assert first is not None
            self._hook("mlp router", first, first)
        self.set_adapter(self.active_adapters)

    def routers(self, adapter_name: str) -> dict[str, Router]:
        """The routers of one adapter by the names of their mixtures."""
        routers = self.moa_router[adapter_name]
        if isinstance(routers, Router):
            return {BLOCK: routers}
        return dict(routers.items())  # type: ignore[operator]

    def get_base_layer(self) -> nn.Module:
        """The block (PEFT asks for the device and dtype of its weights)."""
        return vars(self)["block"]

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        own = set(map(id, self.parameters()))
        base = [p for p in base_layer.parameters() if id(p) not in own]
        floating = [p for p in base if p.is_floating_point()]
        linears = [m for m in base_layer.modules() if hasattr(m, "compute_dtype")]
        # The widest parameter stands for the block; norms are sometimes kept in another dtype.
        first = max(floating or base, key=lambda p: p.numel(), default=None)
        if first is None:
            return None, None
        device = _execution_device(base_layer) if first.is_meta else None
        return device or first.device, linears[0].compute_dtype if linears else first.dtype  # type: ignore[return-value]

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        # PEFT calls this after whatever may have made all adapter weights trainable.
        for adapter_name in self.moa_router:
            for router in self.routers(adapter_name).values():
                for parameter in router.frozen_parameters():
                    parameter.requires_grad_(False)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch every mixture of the block on or off; off, the block computes what the base model does, bitwise."""
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible: the weights of a mixture depend on the token."""
        raise NotImplementedError(MERGE_MESSAGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    # Routing

    def _running(self) -> list[str]:
        if self._disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.moa_router]

    def pools_sequences(self) -> bool:
        """Whether an active mixture routes whole sequences."""
        return any(self.mixtures[name].granularity == "sequence" for name in self._running())

    def wants_token_mask(self) -> bool:
        """Whether an active mixture has auxiliary losses, which leave out padding."""
        return self.auxiliary.has_losses(self._running())

    def start(self, hidden: torch.Tensor, cache: Any, *, pooling: Pooling | None, tokens: torch.Tensor | None) -> None:
        """Called when the block starts: route from the residual stream where that is the router's input.

        Args:
            hidden: ``[B, T, D]`` input of the block.
            cache: key-value cache of the call, or None.
            pooling: what mixtures of sequence granularity pool over, or None.
            tokens: ``[B, T]`` bool, the tokens that are no padding, or None.
        """
        eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        decoding = eager and cache is not None and hidden.shape[1] == 1
        running = tuple(self._running())
        if tokens is None and self.training and torch.is_grad_enabled() and self.auxiliary.has_losses(running):
            raise UserError(
                "Auxiliary losses: the block was called without the tokens that are no padding. Call the whole model; "
                "a family that does not hand unknown arguments to its blocks cannot be used with losses."
            )
        call = Call(id(self), cache, pooling, tokens, decoding=decoding, running=running)
        self.calls.start(call)
        for name in call.running:
            mixtures = self.mixtures[name]
            if BLOCK not in mixtures.mixtures:
                continue
            if mixtures.router_input == "residual":
                self._route(call, name, BLOCK, hidden)
            elif self.norm_name is None:
                # A family without a norm before attention: a norm without parameters keeps the scale over depth.
                self._route(call, name, BLOCK, F.rms_norm(hidden, (hidden.shape[-1],)))

    def finish(self) -> None:
        """Called when the block ends, however it ends: who records gets the routings, and nothing else is kept."""
        call = self.calls.current()
        self.calls.finish()
        if self.recorder is not None and call is not None:
            for adapter_name, routings in call.routings.items():
                for mixture, routing in routings.items():
                    self.recorder(adapter_name, mixture, routing)

    def _route(self, call: Call, adapter_name: str, mixture: str, hidden: torch.Tensor) -> None:
        router = self.routers(adapter_name)[mixture]
        if self.mixtures[adapter_name].granularity == "sequence":
            key = (id(self), adapter_name)
            routing = route_sequences(router, hidden, call.pooling, call.cache, key)
        else:
            routing = router(hidden)
        self.keep_routing(call, adapter_name, mixture, routing)

    def keep_routing(self, call: Call, adapter_name: str, mixture: str, routing: Routing) -> None:
        """Keep a routing for the sites of the block, with its auxiliary losses, instead of an earlier one."""
        if call.tokens is not None:
            earlier = call.attachments.get((adapter_name, mixture))
            if earlier is not None:
                earlier.counts = False
            # A compiled forward has one routing for each router, and no place for such an object.
            attachment = None if torch.compiler.is_compiling() else Attachment()
            if attachment is not None:
                call.attachments[adapter_name, mixture] = attachment
            routing = self.auxiliary.attach(
                adapter_name, mixture, routing, call.tokens, training=self.training, attachment=attachment
            )
        call.routings[adapter_name][mixture] = routing

    def check_prompt_ran(self) -> None:
        """Raise if a prompt expert should have acted and did not, instead of training without it."""
        call = self.calls.current()
        if call is None or call.prompt_ran:
            return
        if any(self.mixtures[name].prompts for name in call.running):
            attention = submodule(vars(self)["block"], self.architecture.attention)
            implementation = getattr(getattr(attention, "config", None), "_attn_implementation", "unknown")
            raise RuntimeError(
                "The prompt expert did not run: this model's attention implementation was registered after the "
                f"adapter was added, or does not go through transformers' attention interface ({implementation!r}). "
                "Set the attention implementation before adding the adapter, or use prompt=False."
            )

    # Hooks

    def _hook(self, kind: str, reads: str, adds_to: str) -> None:
        if (kind, reads, adds_to) in self._handles:
            return
        block = vars(self)["block"]
        source, target = submodule(block, reads), submodule(block, adds_to)
        assert source is not None and target is not None
        if kind == "norm":
            handle: Any = target.register_forward_hook(self._after_norm)
        elif kind == "mlp router":
            handle = target.register_forward_pre_hook(self._before_mlp, with_kwargs=True)
        elif kind == "attention":
            target.__dict__[PROMPT_SITE] = PromptSite(self, self.architecture)
            handle = None
        elif kind == "gated_mlp":
            # The MLP asks for these experts itself.
            handle = None
        else:
            if source is not target:
                handle = source.register_forward_pre_hook(partial(self._keep_input, (reads, adds_to)))
                self._handles[("input", reads, adds_to)] = handle
            handle = target.register_forward_hook(partial(self._after_site, (reads, adds_to)), with_kwargs=True)
        self._handles[(kind, reads, adds_to)] = handle

    def remove_hooks(self) -> None:
        """Take every hook off the block's modules, and give them their own classes back."""
        self.fused_path.uninstall()
        for (kind, _, adds_to), handle in self._handles.items():
            if kind == "attention":
                attention = submodule(vars(self)["block"], adds_to)
                assert attention is not None
                attention.__dict__.pop(PROMPT_SITE, None)
            elif handle is not None:
                handle.remove()
        self._handles = {}

    def _after_norm(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        call = self.calls.current()
        if call is None:
            return
        for name in call.running:
            mixtures = self.mixtures[name]
            wanted = BLOCK in mixtures.mixtures and mixtures.router_input == "normed"
            if wanted and BLOCK not in call.routings[name] and not self.fused_path.route(call, name, BLOCK, output):
                self._route(call, name, BLOCK, output)

    def _before_mlp(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.calls.current()
        if call is None:
            return
        x = args[0] if args else next(iter(kwargs.values()))
        for name in call.running:
            if MLP in self.mixtures[name].mixtures and not self.fused_path.route(call, name, MLP, x):
                self._route(call, name, MLP, x)

    def _keep_input(self, site: Site, module: nn.Module, args: tuple[Any, ...]) -> None:
        call = self.calls.current()
        if call is not None and call.running:
            call.inputs[site] = args[0]

    def _after_site(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        call = self.calls.current()
        if call is None or not call.running:
            return None
        if call.decoding and args and site[0] == site[1] and type(output) is torch.Tensor:
            running = call.steps.get(call.running[0])
            if running is not None and len(call.running) == 1 and site in running.step.writes:
                return running.add(site, args[0], output)
        x = call.inputs.pop(site, None)
        if x is None:
            x = args[0] if args else next(iter(kwargs.values()))
        result = output[0] if isinstance(output, tuple) else output
        for name in call.running:
            fused = self.fused_path.add(call, name, site, module, x, result)
            result = self._add_plainly(call, name, site, x, result) if fused is None else fused
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def _add_plainly(
        self, call: Call, adapter_name: str, site: Site, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        for mixture, columns, slot in self.mixtures[adapter_name].at(site):
            expert: nn.Module = self.moa_experts[adapter_name].get_submodule(slot.name)
            weight = self._weight(call, adapter_name, mixture, columns, x, expert)
            result = result + expert(x, weight).to(result.dtype)
        return result

    def _weight(
        self,
        call: Call,
        adapter_name: str,
        mixture: Mixture,
        columns: tuple[int, ...],
        x: torch.Tensor,
        expert: nn.Module,
    ) -> torch.Tensor:
        """``[.., n]`` routing weights of one expert for what its site reads; a router at the site routes first."""
        if mixture.name == UNROUTED:
            return x.new_ones(*x.shape[:-1], len(columns))
        key = (adapter_name, mixture.name)
        if mixture.is_at_site and call.routed_from.get(key) is not x:
            by_core = self.mixtures[adapter_name].router_input == "core"
            read = expert.lora_A(expert.dropout(x)) if by_core else x  # type: ignore[operator]
            self._route(call, adapter_name, mixture.name, read)
            call.routed_from[key] = x
        return self.routing_of(call, adapter_name, mixture.name).weight_of(columns, like=x)

    def routing_of(self, call: Call, adapter_name: str, mixture: str) -> Routing:
        """The routing of a mixture in this forward.

        Raises:
            RuntimeError: if its router has not run.
        """
        routing = call.routings[adapter_name].get(mixture)
        if routing is None:
            raise RuntimeError(
                f"The router of mixture {mixture!r} (adapter {adapter_name!r}) has not run: its experts are called "
                f"before the module whose input or output it reads ({self.norm_name!r}). Describe this model's "
                "modules with MoAConfig(architecture=...), or use router_input='residual'."
            )
        return routing

    def prompt_slots(self) -> list[tuple[PromptExpert, torch.Tensor | None]]:
        """The prompt experts that act in this forward, with their routing weights ``[B, T, 1]``; None is 1."""
        call = self.calls.current()
        if call is None:
            return []
        found = []
        for name in call.running:
            for mixture, columns, slot in self.mixtures[name].prompts:
                expert = self.moa_experts[name]._modules[slot.name]
                if mixture.name == UNROUTED:
                    found.append((expert, None))
                else:
                    weights = self.routing_of(call, name, mixture.name).weights
                    found.append((expert, weights[..., columns[0] : columns[0] + 1]))
        return found


def _execution_device(block: nn.Module) -> torch.device | None:
    """Where accelerate runs a block whose weights it keeps elsewhere, on the meta device between two forwards."""
    for module in block.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


MERGE_MESSAGE = (
    "A mixture of adapters cannot be merged into the base model: its weights depend on the token. Keep the adapter "
    "(PeftModel.from_pretrained(base, folder)), or call unload() for the base model without it."
)
