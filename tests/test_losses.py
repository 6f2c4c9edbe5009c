"""Auxiliary losses: values by hand, padding, processes, and which routers they fit."""

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from moa_peft.errors import UserError
from moa_peft.fields import build_options
from moa_peft.losses import LOSSES, Loss, check_losses, loss_entries, loss_values, parse_losses
from moa_peft.losses.values import Reduce
from moa_peft.routers import ROUTERS
from moa_peft.routers.sparsegen import sparsegen
from moa_peft.routing import Routing

ENTRIES: list[dict[str, Any]] = [
    {"type": "balance"},
    {"type": "balance", "load": "weights"},
    {"type": "balance", "importance": "above_threshold"},
    {"type": "balance", "normalised": True},
    {"type": "importance"},
    {"type": "z"},
    {"type": "entropy"},
    {"type": "sparsity"},
]
each_loss = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: "-".join(map(str, entry.values())))
EXPERTS = 5
WORLD = 2


def loss(type: str, **options: Any) -> Loss:
    return parse_losses([{"type": type, "coefficient": 1.0} | options])[0]


def value(made: Loss, routing: Routing, mask: torch.Tensor | None = None, reduce: Reduce = "local") -> torch.Tensor:
    return loss_values([made], routing, mask, reduce=reduce)[made.name]


def top(scores: list[list[float]], k: int) -> Routing:
    """The routing that keeps the k largest of given scores."""
    p = torch.tensor(scores, requires_grad=True)
    weights = torch.zeros_like(p).scatter(-1, p.topk(k).indices, p.topk(k).values)
    return Routing(weights=weights / weights.sum(-1, keepdim=True), scores=p)


def assert_number(found: torch.Tensor, expected: float) -> None:
    torch.testing.assert_close(found.item(), expected, rtol=1e-6, atol=1e-7)


def test_balance_by_hand():
    routing = top([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], k=1)
    found = value(loss("balance"), routing)
    # f = (2/3, 1/3), P = (1.7/3, 1.3/3)
    assert_number(found, 2 * (2 * 1.7 + 1 * 1.3) / 9)
    (gradient,) = torch.autograd.grad(found, routing.scores)
    # E f_i / N through P alone: f has no gradient.
    torch.testing.assert_close(gradient, torch.tensor([[4 / 9, 2 / 9]]).expand(3, 2))


def test_the_load_of_top_k_adds_up_to_k():
    even = [[1 / 3, 1 / 3, 1 / 3]] * 4
    assert_number(value(loss("balance"), top(even, k=2)), 2.0)
    assert_number(value(loss("balance", normalised=True), top(even, k=2)), 1.0)


def test_balance_by_mean_weights():
    routing = top([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], k=2)
    found = value(loss("balance", load="weights"), routing)
    assert_number(found, 2 * (1.7**2 + 1.3**2) / 9)
    (gradient,) = torch.autograd.grad(found, routing.weights)
    torch.testing.assert_close(gradient, 2 / 9 * torch.tensor([[1.7, 1.3]]).expand(3, 2))


def test_balance_above_the_threshold_can_be_negative():
    routing = top([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]], k=1)
    tau = torch.tensor([[0.7], [0.8]], requires_grad=True)
    routing = Routing(weights=routing.weights, scores=routing.scores, threshold=tau)
    found = value(loss("balance", importance="above_threshold"), routing)
    assert_number(found, 3 * (1.1 - 1.5) / 2)
    (gradient,) = torch.autograd.grad(found, tau)
    torch.testing.assert_close(gradient, torch.full((2, 1), -3 / 2))


def test_importance_by_hand():
    routing = top([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], k=1)
    assert_number(value(loss("importance"), routing), 0.2**2 / 1.5**2)
    assert_number(value(loss("importance"), top([[0.9, 0.1], [0.1, 0.9]], k=1)), 0.0)


def test_z_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    routing = Routing(weights=logits.softmax(-1), scores=logits.softmax(-1), logits=logits)
    assert_number(value(loss("z"), routing), (math.log(4.0) ** 2 + (5 + math.log(2.0)) ** 2) / 2)


def test_entropy_by_hand():
    routing = top([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], k=1)
    assert_number(value(loss("entropy", q=1), routing), (math.log(2) / math.log(3) + 0 + 1) / 3)
    most = (1 - 3 ** (1 - 1.1)) / 0.1
    half = (1 - 2 * 0.5**1.1) / 0.1
    assert_number(value(loss("entropy"), routing), (half / most + 0 + 1) / 3)


def test_sparsity_by_hand():
    logits = torch.tensor([[1.8, 0.0, 2.0, 1.5], [9.0, 8.0, 0.0, 0.0]], requires_grad=True)
    sparsity = torch.tensor([[-0.1], [-0.1]], requires_grad=True)
    routing = Routing(weights=logits, scores=logits, logits=logits, sparsity=sparsity)
    # lambda_lower(2) = 1 - (3.8 - 2 * 1.5) = 0.2, and 1 - 17 for the second token, which keeps two as it is.
    found = value(loss("sparsity"), routing)
    assert_number(found, (0.2 + 0.1) / 2)
    found.backward()
    torch.testing.assert_close(sparsity.grad, torch.tensor([[-0.5], [0.0]]))
    assert logits.grad is None


def test_sparsity_vanishes_where_at_most_k_experts_are_kept():
    logits = torch.tensor([[1.8, 0.0, 2.0, 1.5]])
    for k, bound in ((1, 1 - (2.0 - 1.8)), (2, 0.2)):
        for step, kept, above in ((1e-3, k, 0.0), (-1e-3, k + 1, 1e-3)):
            sparsity = torch.tensor([[bound + step]])
            weights = sparsegen(logits, 1 - sparsity)
            assert int((weights > 0).sum()) == kept
            routing = Routing(weights=weights, scores=weights, logits=logits, sparsity=sparsity)
            assert value(loss("sparsity", k=k), routing).item() == pytest.approx(above, abs=1e-6)


def leaves(rows: int, tokens: int, seed: int = 5) -> dict[str, torch.Tensor]:
    """What a routing is made of, as leaves that collect gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"logits": EXPERTS, "threshold": 1, "sparsity": 1}
    return {
        name: torch.randn(rows, tokens, size, generator=generator, dtype=torch.float64) for name, size in sizes.items()
    }


def routing_of(made_of: dict[str, torch.Tensor]) -> Routing:
    scores = made_of["logits"].softmax(-1)
    kept = scores >= scores.topk(2).values[..., -1:]
    return Routing(weights=scores * kept, scores=scores, **made_of)


def value_and_gradients(
    made: Loss, routing: Routing, mask: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its gradients with respect to everything in the routing."""
    routing = routing.map(lambda values: values.detach().clone().requires_grad_())
    found = value(made, routing, mask)
    gradients = torch.autograd.grad(found, list(vars(routing).values()), materialize_grads=True)
    return found.detach(), dict(zip(vars(routing), gradients))


def placed(tensor: torch.Tensor, mask: torch.Tensor, fill: float) -> torch.Tensor:
    """The tokens of ``[1, n, w]`` at the True places of ``[B, T]``."""
    target = torch.full((*mask.shape, tensor.shape[-1]), fill, dtype=tensor.dtype)
    target[mask] = tensor[0]
    return target


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flattened"])
@pytest.mark.parametrize("side", ["left", "right"])
@each_loss
def test_padding_changes_neither_value_nor_gradient(entry, side, flat):
    """Tokens of two rows, 3 and 5 of them, are padded with what no computation survives."""
    made = loss(**entry)
    real = routing_of(leaves(1, 8))
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    mask = mask if side == "right" else mask.flip(-1)
    expected, expected_gradients = value_and_gradients(made, real, None)
    padded = real.map(lambda values: placed(values, mask, math.nan))
    shaped = padded.map(lambda values: values.flatten(0, 1)) if flat else padded
    found, gradients = value_and_gradients(made, shaped, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert max(gradient.abs().max() for gradient in expected_gradients.values()) > 1e-3
    for name, gradient in gradients.items():
        wanted = placed(expected_gradients[name], mask, 0.0)
        torch.testing.assert_close(gradient.view_as(wanted), wanted, rtol=1e-11, atol=1e-14)
    # And without the mask padding counts.
    unmasked, _ = value_and_gradients(made, padded.map(lambda values: values.nan_to_num(0.3)), None)
    assert abs(float(unmasked - expected)) > 1e-3


@each_loss
def test_without_a_real_token_the_loss_is_zero(entry):
    found, gradients = value_and_gradients(
        loss(**entry), routing_of(leaves(2, 3)), torch.zeros(2, 3, dtype=torch.bool)
    )
    assert found.item() == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_a_mask_of_other_tokens_is_refused():
    with pytest.raises(UserError, match="tells about 8 tokens, and the router saw 6"):
        value(loss("balance"), routing_of(leaves(2, 3)), torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("balance", "losses is 'balance'"),
        ([{"coefficient": 1.0}], r"losses\[0\] is .*with a 'type' \(balance, importance, z, entropy, sparsity\)"),
        ([{"type": "balanse", "coefficient": 1.0}], r"losses\[0\] \(balanse\): Unknown loss type"),
        ([{"type": "z"}], r"losses\[0\] \(z\): option 'coefficient' is required"),
        ([{"type": "z", "coefficient": 0}], r"losses\[0\] \(z\): coefficient is 0"),
        ([{"type": "z", "coefficient": 1.0, "reduction": "max"}], "reduction is 'max'"),
        ([{"type": "z", "coefficient": 1.0, "qq": 2}], r"losses\[0\] \(z\): unknown option 'qq'"),
        ([{"type": "z", "coefficient": 1.0}, {"type": "z", "coefficient": 2.0}], r"losses\[1\] \(z\): .* twice"),
        ([{"type": "balance", "coefficient": 1.0, "load": "all"}], "load is 'all'; allowed: 'selected', 'weights'"),
        ([{"type": "balance", "coefficient": 1.0, "importance": "x"}], "importance is 'x'"),
        ([{"type": "balance", "coefficient": 1.0, "normalised": 1}], "normalised is 1"),
        ([{"type": "entropy", "coefficient": 1.0, "q": 0}], "q is 0"),
        ([{"type": "sparsity", "coefficient": 1.0, "k": 0}], "k is 0"),
    ],
)
def test_entries_that_are_refused(entries, message):
    with pytest.raises(UserError, match=message):
        parse_losses(entries)


def test_entries_are_written_out():
    entries = [{"type": "entropy", "coefficient": 0.01}, {"type": "balance", "coefficient": 0.1, "load": "weights"}]
    written = loss_entries(parse_losses(entries))
    assert written == [
        {"type": "entropy", "coefficient": 0.01, "reduction": "sum", "q": 1.1},
        {
            "type": "balance",
            "coefficient": 0.1,
            "reduction": "sum",
            "load": "weights",
            "importance": "scores",
            "normalised": False,
        },
    ]
    assert loss_entries(parse_losses(written)) == written
    assert parse_losses(None) == ()


def check(entry: dict[str, Any], router: str, options: dict[str, Any], **numbers: Any) -> None:
    made = parse_losses([{"coefficient": 1.0} | entry])
    check_losses(made, router, build_options(ROUTERS[router].Options, options, where="router"), **numbers)


FITTING = [
    ({"type": "balance"}, "top_k", {}),
    ({"type": "balance"}, "sigmoid", {"threshold": "learned"}),
    ({"type": "balance", "load": "weights"}, "dynmole", {}),
    ({"type": "balance", "load": "weights"}, "sigmoid", {}),
    ({"type": "balance", "importance": "above_threshold"}, "adamole", {}),
    ({"type": "balance", "importance": "above_threshold"}, "sigmoid", {"threshold": "constant"}),
    ({"type": "balance", "normalised": True}, "sparsegen", {}),
    ({"type": "importance"}, "sigmoid", {}),
    ({"type": "z"}, "top_k", {"k": 20}),
    ({"type": "balance"}, "top_k", {"k": 20}),
    ({"type": "entropy"}, "softmax", {"scaled": True}),
    ({"type": "entropy"}, "top_p", {}),
    ({"type": "sparsity"}, "sparsegen", {}),
]
REFUSED = [
    ({"type": "balance"}, "softmax", {}, "selects every expert"),
    ({"type": "balance"}, "sigmoid", {}, "selects every expert"),
    ({"type": "balance", "importance": "above_threshold"}, "top_k", {}, "has no threshold"),
    ({"type": "balance"}, "top_p", {"p": 1.0}, "selects every expert"),
    ({"type": "entropy"}, "sigmoid", {}, "has scores that do not add up to 1"),
    ({"type": "z"}, "sigmoid", {"threshold": "learned"}, "has scores that do not add up to 1"),
    ({"type": "sparsity"}, "top_k", {}, "predicts no sparsity"),
    ({"type": "importance"}, "constant", {}, "learns nothing"),
]


@pytest.mark.parametrize(("entry", "router", "options"), FITTING, ids=str)
def test_losses_that_fit_a_router(entry, router, options):
    before = torch.get_rng_state()
    check(entry, router, options)
    assert torch.equal(torch.get_rng_state(), before), "a check draws no random numbers"


@pytest.mark.parametrize(("entry", "router", "options", "message"), REFUSED, ids=str)
def test_losses_that_do_not_fit_a_router(entry, router, options, message):
    with pytest.raises(UserError, match=rf"losses.*{router}.*{message}"):
        check(entry, router, options)


def test_a_balance_that_is_constant_in_every_mixture_is_refused():
    """And where it is so in some, it is left in, with no gradient."""
    check({"type": "balance"}, "top_k", {"k": 2}, num_experts=[2, 4])
    check({"type": "balance", "load": "weights"}, "top_k", {"k": 2}, num_experts=[2])
    with pytest.raises(UserError, match="'top_k' selects every expert"):
        check({"type": "balance"}, "top_k", {"k": 2}, num_experts=[2])
    logits = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    scores = logits.softmax(-1)
    for normalised, expected in ((False, 2.0), (True, 1.0)):
        found = value(loss("balance", normalised=normalised), Routing(weights=scores, scores=scores))
        assert_number(found, expected)
        (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
        assert gradient.abs().max() < 1e-15


def test_sparsity_needs_more_than_k_experts():
    check({"type": "sparsity", "k": 3}, "sparsegen", {}, num_experts=[4, 8])
    with pytest.raises(UserError, match="k is 4, and a router has 4 experts"):
        check({"type": "sparsity", "k": 4}, "sparsegen", {}, num_experts=[4, 8])
    with pytest.raises(UserError, match="k is 5, and a router has 5 experts"):
        value(loss("sparsity", k=5), routing_of(leaves(1, 2)))


def test_every_loss_is_in_the_tests():
    assert {entry["type"] for entry in ENTRIES} == set(LOSSES)


# Two processes


def share_of(rank: int) -> slice:
    """Rows of a process: as different in number of tokens as can be."""
    return [slice(0, 1), slice(1, 4)][rank]


def distributed_mask() -> torch.Tensor:
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, 2:] = False
    mask[3, 4:] = False
    return mask


def global_loss(entry: dict[str, Any], rows: slice, weight: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """The loss of some rows, whose logits depend on a shared weight."""
    made_of = {name: tensor[rows] for name, tensor in leaves(4, 6).items()}
    made_of = {name: tensor * weight[: tensor.shape[-1]] for name, tensor in made_of.items()}
    return value(loss(**entry), routing_of(made_of), distributed_mask()[rows], reduce)


def run(rank: int, port: int, folder: str) -> None:
    """One process: value and gradient, averaged over processes as data parallelism does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        results = []
        for entry in ENTRIES:
            for reduce in ("global", "local"):
                weight = torch.linspace(0.5, 1.5, EXPERTS, dtype=torch.float64).requires_grad_()
                found = global_loss(entry, share_of(rank), weight, reduce)
                found.backward()
                assert weight.grad is not None
                dist.all_reduce(weight.grad)
                results.append((found.detach(), weight.grad / WORLD))
        if rank == 1:
            torch.save(results, Path(folder) / "results.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results_of_two(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[torch.Tensor, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("results")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run, args=(port, str(folder)), nprocs=WORLD)
    return torch.load(folder / "results.pt")


@each_loss
def test_two_processes_equal_one_when_reduced_globally(entry, results_of_two):
    weight = torch.linspace(0.5, 1.5, EXPERTS, dtype=torch.float64).requires_grad_()
    expected = global_loss(entry, slice(None), weight, "local")
    expected.backward()
    assert weight.grad is not None and weight.grad.abs().max() > 1e-4
    first = 2 * ENTRIES.index(entry)
    found, gradient = results_of_two[first]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-10, atol=1e-13)
    _, local_gradient = results_of_two[first + 1]
    assert not torch.allclose(local_gradient, weight.grad, rtol=1e-3)
