"""The losses that are means over tokens: router z-loss, entropy, sparsity.

- z (ST-MoE, arXiv 2202.08906): ``mean_t logsumexp_i(u_ti)^2`` of the logits u of a softmax; keeps them small.
- entropy (DynMoLE, arXiv 2504.00661): ``mean_t H_q(p_t) / max H_q``, the normalised Tsallis entropy of the scores,
  Shannon's for q = 1; makes the routing confident.
- sparsity (LD-MoLE, arXiv 2509.25684): ``mean_t relu(lambda_lower(k) - lambda_t)`` with
  ``lambda_lower(k) = 1 - (U_k - k u_(k+1))``, where ``u_(j)`` is the j-th largest logit and ``U_k`` the sum of the k
  largest: below lambda_lower more than k experts take part. As in the released code the bound has no gradient, only
  the predicted lambda is taught.
"""

from dataclasses import dataclass

import torch

from moa_peft.entropy import tsallis_entropy
from moa_peft.errors import UserError
from moa_peft.fields import check_positive_int, check_range
from moa_peft.losses.base import LOSSES, LossOptions, Needs, TokenMean
from moa_peft.routing import Routing


@LOSSES.register("z")
class ZLoss(TokenMean):
    """``mean_t logsumexp(u_t)^2``."""

    Options = LossOptions
    name = "z"
    options: LossOptions

    def per_token(self, routing: Routing) -> torch.Tensor:
        assert routing.logits is not None
        return routing.logits.logsumexp(-1).square()

    def needs(self) -> tuple[Needs, ...]:
        return ("logits", "probabilities")


@dataclass(kw_only=True)
class EntropyOptions(LossOptions):
    """Options of the entropy loss.

    Attributes:
        q: index of the Tsallis entropy; 1 is Shannon's.
    """

    q: float = 1.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("q", self.q, 0.0, float("inf"))


@LOSSES.register("entropy")
class EntropyLoss(TokenMean):
    """``mean_t H_q(p_t) / max H_q``."""

    Options = EntropyOptions
    name = "entropy"
    options: EntropyOptions

    def per_token(self, routing: Routing) -> torch.Tensor:
        return tsallis_entropy(routing.scores, q=self.options.q, normalised=True)

    def needs(self) -> tuple[Needs, ...]:
        return ("probabilities",)


@dataclass(kw_only=True)
class SparsityOptions(LossOptions):
    """Options of the sparsity loss.

    Attributes:
        k: how many experts a token should have at most; less than there are.
    """

    k: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("k", self.k)


@LOSSES.register("sparsity")
class SparsityLoss(TokenMean):
    """``mean_t relu(lambda_lower(k) - lambda_t)``."""

    Options = SparsityOptions
    name = "sparsity"
    options: SparsityOptions

    def per_token(self, routing: Routing) -> torch.Tensor:
        assert routing.logits is not None and routing.sparsity is not None
        k = self.options.k
        self.check_num_experts(routing.logits.shape[-1])
        largest = routing.logits.detach().topk(k + 1).values
        lower = 1 - (largest[..., :k].sum(-1) - k * largest[..., k])
        return torch.relu(lower - routing.sparsity[..., 0])

    def needs(self) -> tuple[Needs, ...]:
        return ("logits", "sparsity")

    def check_num_experts(self, num_experts: int) -> None:
        if self.options.k >= num_experts:
            raise UserError(
                f"losses (sparsity): k is {self.options.k}, and a router has {num_experts} experts; k must be less "
                "than the number of experts of every router."
            )
