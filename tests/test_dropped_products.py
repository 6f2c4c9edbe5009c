"""Products with dropout keep a mask, and equal dropout and a product under autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moa_peft.glu import gated_down
from moa_peft.initialization import MasterLinear
from moa_peft.packed import drop_mask, dropped, read_dropped

P = 0.3


def gradients_of(make: Callable[[], list[torch.Tensor]], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Values, and gradients of a sum with fixed weights, under one seed."""
    torch.manual_seed(3)
    values = make()
    generator = torch.Generator().manual_seed(4)
    total = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in values)
    return [*values, *torch.autograd.grad(total, inputs)]  # type: ignore[arg-type]


def test_the_mask_drops_the_wanted_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(200, 100)
    mask = drop_mask(x, P)
    assert mask.dtype == torch.bool and abs(mask.float().mean() - (1 - P)) < 0.01
    values = dropped(x, mask, P)
    assert values.unique().tolist() == pytest.approx([0.0, 1 / (1 - P)])
    assert torch.equal(x, torch.ones(200, 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading(dtype: torch.dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8).to(dtype).requires_grad_()
    linears = [MasterLinear(8, width, bias=False) for width in (3, 4)]
    weights = [linear.weight for linear in linears]

    def expected() -> list[torch.Tensor]:
        mask = drop_mask(x, P)
        return [F.linear(x * mask * (1 / (1 - P)), torch.cat(weights).to(dtype)).float()]

    found = gradients_of(lambda: [read_dropped(x, linears, P).float()], [x, *weights])
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for one, other in zip(found, gradients_of(expected, [x, *weights]), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("with_plain_reads", [False, True])
def test_down_projection(with_plain_reads: bool):
    torch.manual_seed(0)
    gate, up = (torch.randn(2, 5, 12, requires_grad=True) for _ in range(2))
    down, activation = nn.Linear(12, 6).requires_grad_(False), nn.SiLU()
    reads = [torch.randn(2, 12, requires_grad=True)] if with_plain_reads else []
    dropped_reads = [torch.randn(3, 12, requires_grad=True), torch.randn(1, 12, requires_grad=True)]

    def fused() -> list[torch.Tensor]:
        values = gated_down(gate, up, activation, down, reads, dropped_reads, P)
        assert (values[1] is None) == (not reads)
        return [value for value in values if value is not None]

    def expected() -> list[torch.Tensor]:
        h = activation(gate) * up
        mask = drop_mask(h, P)
        plain = [F.linear(h, read) for read in reads]
        return [down(h), *plain, F.linear(h * mask * (1 / (1 - P)), torch.cat(dropped_reads))]

    inputs = [gate, up, *reads, *dropped_reads]
    for one, other in zip(gradients_of(fused, inputs), gradients_of(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_only_the_mask_is_kept_beside_the_input():
    x = torch.randn(64, 32, requires_grad=True)
    linear = MasterLinear(32, 4, bias=False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        read_dropped(x, [linear], P)
    sizes = sorted(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not linear.weight)
    assert sizes == [x.numel(), 4 * x.numel()]
