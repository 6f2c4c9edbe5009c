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

SiteKind = Literal["linear", "mlp", "attention", "gated_mlp"]


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
        num: how many copies, each with its own weights and its own column in the routing. A list gives the number in
            each of that many groups of consecutive blocks: ``[2, 4, 6, 8]`` is 2 in the first quarter, and so on.
        layers: blocks that get the expert: a list of indices, or a string such as ``0-11,20``; None is all of them.
        optional: leave the expert out, with a warning, where a model family has no such site. The presets set it;
            for an expert listed by hand a missing site is an error.
        routed: False gives it the constant weight 1 and no column in the routing.
        group: experts of one router with the same group share one routing weight; None: one of its own.
    """

    num: int | list[int] = 1
    layers: list[int] | str | None = None
    optional: bool = False
    routed: bool = True
    group: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.num, tuple):
            self.num = list(self.num)
        if isinstance(self.num, list) and not self.num:
            raise UserError("num is []; it must be an integer of at least 1, or a list of them.")
        for number in self.num if isinstance(self.num, list) else [self.num]:
            check_positive_int("num", number)
        self.layer_indices()
        for name in ("optional", "routed"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be true or false.")
        if self.group is not None and (not isinstance(self.group, str) or not self.group):
            raise UserError(f"group is {self.group!r}; it must be a name, or null.")
        if self.group is not None and not self.routed:
            raise UserError(f"group is {self.group!r} and routed is false; an expert without a router is in no group.")

    def copies(self, block: int, num_blocks: int) -> int:
        """How many copies the block number `block` of `num_blocks` gets."""
        return self.num if isinstance(self.num, int) else self.num[block * len(self.num) // num_blocks]

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
                low, dash, high = part.strip().partition("-")
                ends = (low, high if dash else low)
                if not all(end.isdecimal() for end in ends):
                    raise problem
                first, last = map(int, ends)
                if first > last:
                    raise UserError(
                        f"layers is {self.layers!r}, and its range {part.strip()!r} goes down; write '{last}-{first}'."
                    )
                indices.update(range(first, last + 1))
        elif isinstance(self.layers, (list, tuple)) and all(type(i) is int and i >= 0 for i in self.layers):
            indices = set(self.layers)
        else:
            raise problem
        if not indices:
            raise problem
        return indices


@dataclass(frozen=True, eq=False)
class Factors:
    """What the fused path needs to know of an expert that is a product of linear layers.

    With ``z = activation(read(x))`` and one routing weight for each of n columns:

    ``scale * sum_i w_i write_i(z)`` with n `writes` (an ordinary expert has n = 1), or, with `has_cores`,
    ``scale * write(sum_i w_i M_i z)`` with one write and the expert's parameter ``cores``, M ``[n, R, R]``.

    Experts of this form that read the same tensor share one product, and those that add to the same tensor another.

    Attributes:
        read: ``[R, in]`` linear layer that reads the site's input.
        writes: ``[out, R]`` linear layers that add to the site's output.
        scale: constant factor.
        activation: function between the two; None is the identity.
        has_cores: see above.
        dropout: probability with which elements of what `read` reads are dropped in training. Experts that read the
            same tensor with the same probability lose the same elements.
    """

    read: MasterLinear
    writes: tuple[MasterLinear, ...]
    scale: float = 1.0
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None
    has_cores: bool = False
    dropout: float = 0.0


class Expert(nn.Module, ABC):
    """A small module whose output, times its routing weight, is added at a site.

    Subclasses set `Options` and `site_kind`. Experts of ``linear`` and ``mlp`` sites implement
    ``forward(x, weight)``: the weighted output to add; those of ``attention`` and ``gated_mlp`` sites see more than
    one tensor and have a signature of their own.

    Args:
        shape: sizes of the site.
        options: an instance of `Options`.
        copies: how many experts the module holds; 1 unless `holds_copies`.
    """

    Options: type[ExpertOptions]
    site_kind: SiteKind
    holds_copies: bool = False
    """Whether one module holds all ``num`` copies, because they share weights; it then has as many columns."""

    def __init__(self, shape: SiteShape, options: ExpertOptions, copies: int = 1) -> None:
        super().__init__()
        self.shape = shape
        self.options = options
        self.copies = copies

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Set the initial weights; under ``identity`` the expert then adds exactly zero."""

    def factors(self) -> Factors | None:
        """The expert as a product of linear layers, equal to its forward; None where it is none."""
        return None


EXPERTS: Registry[type[Expert]] = Registry("expert type")
