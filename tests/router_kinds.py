"""One small router of every kind, for tests that go through all of them."""

import torch

from moa_peft.routers import ROUTERS, Router
from moa_peft.routing import Routing
from tests.models import randomise

WIDTH, EXPERTS = 12, 5
KINDS = {
    "sigmoid": {"hidden_per_expert": 0},
    "sigmoid_sparse": {"hidden_per_expert": 0, "threshold": "learned", "threshold_gradient": "shifted"},
    "softmax": {},
    "softmax_scaled": {"scaled": True},
    "top_k": {"k": 2},
    "top_k_noisy": {"k": 2, "noise": True, "bias": False},
    "top_k_unrenormalised": {"k": 2, "renormalise": False},
    "top_p": {},
    "adamole": {},
    "adamole_high": {"max_threshold": 1.0},
    "dynmole": {},
    "sparsegen": {},
    "constant": {"weight": 0.3},
}
"""Routers and options; the type is the longest prefix that is one."""


def hidden(seed: int = 3) -> torch.Tensor:
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(seed))


def build(kind: str, num_experts: int = EXPERTS, **options: object) -> Router:
    name = max((name for name in ROUTERS if kind.startswith(name)), key=len)
    options = KINDS[kind] | options
    if "k" in options and num_experts == 1:
        # One kept weight that is divided by itself could teach the router nothing, and is refused.
        options |= {"k": 1, "renormalise": False}
    if name == "dynmole":
        options.setdefault("keep_top_k", min(2, num_experts))
    made = ROUTERS[name](WIDTH, num_experts, ROUTERS[name].Options(**options)).eval()
    network = made.shared_network(WIDTH, made.options)
    if network is not None:
        randomise(network, std=0.5)
        made.share(network)
    randomise(made, std=0.5)
    return made


def route(made: Router, logits: torch.Tensor, *, others: float | None = None) -> Routing:
    """The routing for given logits of a linear head; what else is read is `others`, or random."""
    products = []
    for linear in made.reads():
        shape = (*logits.shape[:-1], linear.out_features)
        noise = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
        products.append(noise if others is None else torch.full(shape, others))
    return made.route([logits, *products[1:]] if products else [])
