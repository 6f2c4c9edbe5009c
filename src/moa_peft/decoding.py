"""One more token of a generation: the fused path with everything decided and packed beforehand.

A decoding step is short, so that deciding and packing anew would cost more than the products. Both are done in the
first step and kept for the generation (`moa_peft.call.Call.once_per_generation`).
"""

import torch
import torch.nn.functional as F

from moa_peft.architectures import ATTENTION_INPUT
from moa_peft.mixture import Mixture
from moa_peft.packed import columns, read_matrix
from moa_peft.plan import Site
from moa_peft.products import SharedInput
from moa_peft.routers import Router
from moa_peft.routing import Routing


class DecodingStep:
    """One adapter in one block while it decodes.

    Args:
        mixture: the adapter; all its sites are products.
        router: its router.
        with_router: whether the router reads what the q, k and v projections read.
        owned: sites whose output may be changed in place.
        dtype: of the hidden states.
    """

    def __init__(
        self, mixture: Mixture, router: Router, *, with_router: bool, owned: frozenset[Site], dtype: torch.dtype
    ) -> None:
        self.router = router
        self.owned = owned
        self.input_of = mixture.shared.input_of
        self.inputs = mixture.shared.inputs
        self.expert_reads = {name: read_matrix(shared.linears(), dtype) for name, shared in self.inputs.items()}
        self.router_sizes: list[int] = []
        if with_router:
            experts = self.inputs[ATTENTION_INPUT].linears()
            self.router_sizes = [sum(linear.out_features for linear in experts)]
            weight, bias = self.router_read = read_matrix([*experts, *router.reads()], dtype)
            rank = self.router_sizes[0]
            self.expert_reads[ATTENTION_INPUT] = weight[:rank], None if bias is None else bias[:rank]
            self.router_sizes += [linear.out_features for linear in router.reads()]
        self.dtype = dtype
        self.writes = {site: columns(product.writes(), dtype).t() for site, product in mixture.products.items()}
        spreads = [
            shared.spread_matrix(dtype, self.expert_reads[name][0].device) for name, shared in self.inputs.items()
        ]
        self.spread = torch.cat(spreads, dim=1) if spreads else None
        self.spread_sizes = [spread.shape[1] for spread in spreads]

    def route(self, hidden: torch.Tensor) -> tuple[Routing, torch.Tensor]:
        """The routing, and ``[B, R]`` what the experts of the q, k and v projections read.

        Args:
            hidden: ``[B, 1, D]``.
        """
        z, *products = F.linear(hidden, *self.router_read).split(self.router_sizes, dim=-1)
        return self.router.route(products), z.reshape(-1, z.shape[-1])

    def start(self, routing: Routing) -> "RunningStep":
        """The step with its routing."""
        weights = routing.weights.reshape(-1, routing.weights.shape[-1]).to(self.dtype)
        scales = () if self.spread is None else (weights @ self.spread).split(self.spread_sizes, dim=-1)
        return RunningStep(self, weights, dict(zip(self.inputs, scales)))


class RunningStep:
    """A decoding step of one block that runs.

    Args:
        step: what was prepared.
        weights: ``[B, E]``.
        scales: name of an input to ``[B, R]``, the scaled weights of what reads it.
    """

    def __init__(self, step: DecodingStep, weights: torch.Tensor, scales: dict[str, torch.Tensor]) -> None:
        self.step = step
        self.weights = weights
        self.scales = scales
        self.read: dict[str, tuple[torch.Tensor, dict[Site, torch.Tensor]]] = {}

    def weigh(self, shared: SharedInput, x: torch.Tensor, z: torch.Tensor) -> dict[Site, torch.Tensor]:
        """Keep the weighted inner activations of all sites that read `x`; `z` is what they read."""
        inner = shared.by_site(shared.activated(z) * self.scales[shared.name], self.weights)
        self.read[shared.name] = (x, inner)
        return inner

    def add(self, site: Site, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`output` plus what the experts of a site make of `x`."""
        step = self.step
        name = step.input_of[site]
        held = self.read.get(name)
        if held is not None and held[0] is x:
            inner = held[1][site]
        else:
            z = F.linear(x.reshape(-1, x.shape[-1]), *step.expert_reads[name])
            inner = self.weigh(step.inputs[name], x, z)[site]
        width = output.shape[-1]
        if site in step.owned and output.dtype == inner.dtype:
            output.view(-1, width).addmm_(inner, step.writes[site])
            return output
        flat = output.reshape(-1, width)
        return torch.addmm(flat, inner.to(flat.dtype), step.writes[site].to(flat.dtype)).view(output.shape)
