"""LD-MoLE router (arXiv 2509.25684): sparsegen projection of the logits with a predicted sparsity.

``u = head(z)``, ``1 - lambda = epsilon + softplus(-f(z)) > epsilon``,
``w = argmin_p |p - u|^2 - lambda |p|^2`` over the simplex, which is ``[(u - tau) / (1 - lambda)]_+`` with the tau that
makes w sum to 1. u and w are ``[..., E]``, lambda is ``[..., 1]``. lambda near 1 leaves few experts, lambda far below
0 all of them.

``f(z) = W2 relu(W1 z + b1) + b2`` is one network per input width, shared by all routers of an adapter.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from moa_peft.fields import check_positive_int, check_range
from moa_peft.initialization import Init, MasterLinear, reset_linear
from moa_peft.routers.base import ROUTERS
from moa_peft.routers.probabilities import HeadOptions, ProbabilityRouter, descending, unsort
from moa_peft.routing import Routing

INITIAL_BIAS = -2.5


@dataclass(kw_only=True)
class SparsegenRouterOptions(HeadOptions):
    """Options of the sparsegen router, besides those of its head.

    Attributes:
        hidden: inner width of the shared network that predicts lambda.
        epsilon: lambda stays below 1 - epsilon; in (0, 1).
    """

    hidden: int = 256
    epsilon: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("router.hidden", self.hidden)
        check_range("router.epsilon", self.epsilon, 0.0, math.nextafter(1.0, 0.0))


class SparsityNetwork(nn.Module):
    """``f(z) = W2 relu(W1 z + b1) + b2``, ``[..., D] -> [..., 1]``.

    Args:
        hidden_size: width D of what it reads.
        hidden: inner width.
    """

    def __init__(self, hidden_size: int, hidden: int) -> None:
        super().__init__()
        self.w1 = MasterLinear(hidden_size, hidden)
        self.w2 = MasterLinear(hidden, 1)

    def forward(self, product: torch.Tensor) -> torch.Tensor:
        """``[..., 1]`` float32, from the ``[..., hidden]`` that ``w1`` returned."""
        return self.w2(F.relu(product.float())).float()

    def reset_parameters(self, init: Init) -> None:
        """Default weights; both biases -2.5, so that lambda starts near -1.6, where most experts are kept."""
        for module in (self.w1, self.w2):
            reset_linear(module, init)
            nn.init.constant_(module.bias, INITIAL_BIAS)


def sparsegen(logits: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """The sparsegen projection, in closed form: sparsemax (arXiv 1602.02068) of ``u / gap``, ``gap = 1 - lambda``.

    With z the scaled logits from large to small, the support is the first k, k the largest j with
    ``1 + j z_j > z_1 + ... + z_j``, and ``tau = (z_1 + ... + z_k - 1) / k``.

    Args:
        logits: ``[..., E]`` u.
        gap: ``[..., 1]`` 1 - lambda, above 0; made without lambda, near whose 1 the difference would be rounded.

    Returns:
        ``[..., E]`` weights, at least one above 0, that sum to 1; differentiable in both arguments.
    """
    # A shift of the logits changes nothing, and keeps the sums below small.
    scaled = (logits - logits.detach().amax(dim=-1, keepdim=True)) / gap
    ordered, order = descending(scaled)
    ranks = torch.arange(1, ordered.shape[-1] + 1, device=ordered.device, dtype=ordered.dtype)
    support = unsort(1 + ranks * ordered > ordered.cumsum(-1), order)
    count = support.sum(dim=-1, keepdim=True)
    tau = (torch.where(support, scaled, 0.0).sum(dim=-1, keepdim=True) - 1) / count
    return torch.where(support, torch.relu(scaled - tau), 0.0)


@ROUTERS.register("sparsegen")
class SparsegenRouter(ProbabilityRouter):
    """Sparsegen weights, see the module's docstring.

    It must be given the network of `shared_network` by `share` before it routes.
    """

    Options = SparsegenRouterOptions
    options: SparsegenRouterOptions

    def __init__(self, hidden_size: int, num_experts: int, options: SparsegenRouterOptions) -> None:
        super().__init__(hidden_size, num_experts, options)
        # In a tuple, because a module set as an attribute would become a child, and be saved with every router.
        self._shared: tuple[SparsityNetwork, ...] = ()

    @classmethod
    def shared_network(cls, hidden_size: int, options: SparsegenRouterOptions) -> SparsityNetwork:
        return SparsityNetwork(hidden_size, options.hidden)

    def share(self, network: nn.Module) -> None:
        if not isinstance(network, SparsityNetwork) or network.w1.in_features != self.hidden_size:
            raise ValueError(
                f"a sparsegen router of width {self.hidden_size} was given {network}; it needs the network that "
                "shared_network makes for that width"
            )
        self._shared = (network,)

    @property
    def network(self) -> SparsityNetwork:
        """The shared network.

        Raises:
            RuntimeError: if there is none yet.
        """
        if not self._shared:
            raise RuntimeError(
                "this sparsegen router has no network to predict its sparsity; make one per input width with "
                "shared_network and give it to each router with share"
            )
        return self._shared[0]

    def reads(self) -> list[MasterLinear]:
        return [*super().reads(), self.network.w1]

    def route(self, products: list[torch.Tensor]) -> Routing:
        logits = self.logits(products)
        gap = self.options.epsilon + F.softplus(-self.network(products[-1]))
        weights = sparsegen(logits, gap)
        return Routing(weights=weights, scores=weights, logits=logits, sparsity=1 - gap)

    def all_parameters(self) -> list[nn.Parameter]:
        return [*self.parameters(), *self.network.parameters()]

    def may_skip(self, *, with_gradient: bool) -> bool:
        return True
