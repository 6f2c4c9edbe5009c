"""Which path each part of a model's mixtures takes, and why (`MoAModel.moa_status`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from moa_peft.layer import MoALayer
from moa_peft.obstacles import obstacles, skipping


@dataclass(frozen=True)
class PartStatus:
    """One part of one mixture in one block.

    Attributes:
        block: full name of the block.
        adapter: name of the adapter.
        part: ``router``, an expert's name, or ``mlp``: the block's own, fused with the experts of its down projection.
        obstacle: why it takes the plain path; None where it takes the fused one.
        skips: whether it leaves out tokens without a weight, in forwards where these are many enough.
    """

    block: str
    adapter: str
    part: str
    obstacle: str | None
    skips: bool = False

    @property
    def path(self) -> str:
        """``fused`` or ``plain``."""
        return "plain" if self.obstacle else "fused"


@dataclass(frozen=True)
class MoAStatus:
    """The parts of every mixture of a model, as they would run in its present mode (training or not).

    Printing it gives a table with one line per group of blocks that are alike.
    """

    parts: tuple[PartStatus, ...]

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str | None, bool], list[str]] = {}
        for part in self.parts:
            groups.setdefault((part.adapter, part.part, part.obstacle, part.skips), []).append(part.block)
        lines = [f"{'adapter':<12} {'part':<20} {'blocks':>6}  path"]
        for (adapter, part, obstacle, skips), blocks in groups.items():
            path = "fused" if obstacle is None else f"plain: {obstacle}"
            path += ", leaves out tokens without a weight" if skips else ""
            lines.append(f"{adapter:<12} {part:<20} {len(blocks):>6}  {path}")
        return "\n".join(lines)


def moa_status(model: nn.Module) -> MoAStatus:
    """Which path each part of the model's mixtures takes.

    Args:
        model: a model with a mixture of adapters, wrapped or not.

    Raises:
        ValueError: if it has none.
    """
    parts = [
        PartStatus(name.removesuffix(".moa"), adapter, part, obstacle, part in skipping(layer, adapter))
        for name, layer in _layers(model).items()
        for adapter in layer.mixtures
        for part, obstacle in obstacles(layer, adapter).items()
    ]
    return MoAStatus(tuple(parts))


@contextmanager
def plain_path(model: nn.Module) -> Iterator[None]:
    """Send everything down the plain path while the context is open: the readable reference, and a check in doubt.

    Args:
        model: a model with a mixture of adapters, wrapped or not.

    Raises:
        ValueError: if it has none.
    """
    paths = [layer.fused_path for layer in _layers(model).values()]
    before = [path.enabled for path in paths]
    try:
        for path in paths:
            path.enabled = False
        yield
    finally:
        for path, enabled in zip(paths, before):
            path.enabled = enabled


def _layers(model: nn.Module) -> dict[str, MoALayer]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoALayer)}
    if not layers:
        raise ValueError("The model has no mixture of adapters.")
    return layers
