"""What every expert is: a small trainable module bound to one kind of site."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from moa_peft.errors import UserError
from moa_peft.fields import check_positive_int
from moa_peft.initialization import Init, MasterLinear
from moa_peft.registry import Registry

SiteKind = Literal["linear", "mlp", "attention"]


@dataclass(frozen=True)
class SiteShape:
    """Sizes of the site that an expert is built for.

    Attributes:
        in_features: width of what the site reads.
        out_features: width of what the site returns.
        num_heads: query heads, for attention sites.
    """

    in_features: int
    out_features: int
    num_heads: int | None = None


@dataclass(kw_only=True)
class ExpertOptions:
    """Options common to all experts of ``experts: [...]``; subclasses add theirs.

    Attributes:
        num: how many copies, each with its own weights and its own column in the routing.
        layers: blocks that get the expert: a list of indices, or a string such as ``0-11,20``; None is all of them.
        optional: leave the expert out, with a warning, where a model family has no such site. The presets set it;
            for an expert listed by hand a missing site is an error.
    """

    num: int = 1
    layers: list[int] | str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        check_positive_int("num", self.num)
        self.layer_indices()
        if not isinstance(self.optional, bool):
            raise UserError(f"optional is {self.optional!r}; it must be true or false.")

    def layer_indices(self) -> set[int] | None:
        """The block indices that `layers` names, or None for all.

        Raises:
            UserError: if `layers` is not of the documented form.
        """
        if self.layers is None:
            return None
        problem = UserError(f"layers is {self.layers!r}; allowed: null, a list of block indices, or '0-11,20'.")
        if isinstance(self.layers, str):
            indices: set[int] = set()
            for part in self.layers.split(","):
                first, _, last = part.strip().partition("-")
                if not first.isdigit() or not (last or first).isdigit():
                    raise problem
                indices.update(range(int(first), int(last or first) + 1))
        elif isinstance(self.layers, (list, tuple)) and all(type(i) is int and i >= 0 for i in self.layers):
            indices = set(self.layers)
        else:
            raise problem
        if not indices:
            raise problem
        return indices


@dataclass(frozen=True)
class Factors:
    """What the fused path needs to know of an expert of the form ``w * scale * write(activation(read(x)))``.

    Experts of this form that read the same tensor share one product, and those that add to the same tensor another.

    Attributes:
        read: ``[R, in]`` linear layer that reads the site's input.
        write: ``[out, R]`` linear layer that adds to the site's output.
        scale: constant factor.
        activation: function between the two; None is the identity.
    """

    read: MasterLinear
    write: MasterLinear
    scale: float = 1.0
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None


class Expert(nn.Module, ABC):
    """A small module whose output, times its routing weight, is added at a site.

    Subclasses set `Options` and `site_kind`. Experts of ``linear`` and ``mlp`` sites implement
    ``forward(x, weight)``: the weighted output to add; those of ``attention`` sites see queries and base projections
    and have a signature of their own.

    Args:
        shape: sizes of the site.
        options: an instance of `Options`.
    """

    Options: type[ExpertOptions]
    site_kind: SiteKind

    def __init__(self, shape: SiteShape, options: ExpertOptions) -> None:
        super().__init__()
        self.shape = shape
        self.options = options

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Set the initial weights; under ``identity`` the expert then adds exactly zero."""

    def factors(self) -> Factors | None:
        """The expert as a product of two linear layers, equal to its forward; None where it is none."""
        return None

    def is_product(self) -> bool:
        """Whether `factors` describes the coming forward too (not while an input of its own is dropped)."""
        return True


EXPERTS: Registry[type[Expert]] = Registry("expert type")
