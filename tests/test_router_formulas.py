"""Every router and the entropies against their formulas, written out independently; gradients against differences."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from moa_peft.entropy import tsallis_entropy
from moa_peft.errors import UserError
from moa_peft.routers import ROUTERS
from moa_peft.routers.adamole import below_largest, threshold_weights
from moa_peft.routers.probabilities import keep, normalise, softmax
from moa_peft.routers.sparsegen import SparsityNetwork, sparsegen
from moa_peft.routers.top_k import top_k_mask
from tests.router_kinds import EXPERTS, WIDTH, build, hidden, route


def float64(*shape: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.requires_grad_()


def test_softmax_and_its_scaled_form():
    logits = torch.randn(6, EXPERTS, generator=torch.Generator().manual_seed(0))
    expected = logits.exp() / logits.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(route(build("softmax"), logits).weights, expected)
    scaled = route(build("softmax_scaled"), logits)
    torch.testing.assert_close(scaled.weights, EXPERTS * expected)
    torch.testing.assert_close(scaled.scores, expected)


def test_top_k_keeps_the_largest_and_of_equal_ones_the_first():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 2.0]])
    routing = route(build("top_k", 4), logits)
    assert routing.selected.tolist() == [
        [False, True, False, True],
        [True, True, False, False],
        [False, True, True, False],
    ]
    e = math.exp(1.0)
    torch.testing.assert_close(routing.weights[0], torch.tensor([0.0, e / (1 + e), 0.0, 1 / (1 + e)]))
    plain = route(build("top_k_unrenormalised", 4), logits)
    torch.testing.assert_close(plain.weights[0], torch.softmax(logits[0], -1) * torch.tensor([0.0, 1.0, 0.0, 1.0]))


def test_noise_follows_its_formula_and_is_drawn_in_training_only():
    made = build("top_k_noisy")
    z = hidden()
    clean = z @ made.head.linear.weight.T
    torch.testing.assert_close(made(z).logits, clean)
    made.train()
    torch.manual_seed(3)
    noisy = made(z)
    torch.manual_seed(3)
    eps = torch.randn_like(clean)
    torch.testing.assert_close(noisy.logits, clean + eps * F.softplus(z @ made.noise.weight.T))
    torch.testing.assert_close(noisy.scores, torch.softmax(noisy.logits, -1))
    assert made.noise.bias is None and [id(m) for m in made.reads()] == [id(made.head.linear), id(made.noise)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 1.0])
def test_top_p_keeps_the_smallest_set_that_exceeds_p(p: float):
    routing = route(build("top_p", 6, p=p), torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    for scores, selected in zip(routing.scores, routing.selected):
        order = scores.argsort(descending=True).tolist()
        count = 1
        while count < 6 and scores[order[:count]].sum() <= p:
            count += 1
        assert {i for i in range(6) if selected[i]} == set(order[:count])


def test_dynmole_follows_its_rule():
    made = build("dynmole", 6, top_p=0.75, keep_top_k=2, entropy_threshold=0.9)
    routing = route(made, 2 * torch.randn(200, 6, generator=torch.Generator().manual_seed(0)))
    q, sizes = 1.1, set()
    for scores, selected in zip(routing.scores.double(), routing.selected):
        entropy = (1 - scores.pow(q).sum()) / (q - 1) / ((1 - 6 ** (1 - q)) / (q - 1))
        order = scores.argsort(descending=True).tolist()
        inside = [i for n, i in enumerate(order) if scores[order[: n + 1]].sum() <= 0.75 or n < 2]
        assert {i for i in range(6) if selected[i]} == (set(range(6)) if entropy > 0.9 else set(inside))
        sizes.add(int(selected.sum()))
    assert sizes >= {2, 3, 6}, "the case must select little, more, and all"


def test_adamole_follows_its_formula():
    made = build("adamole")
    z = hidden()
    p = torch.softmax(z @ made.head.linear.weight.T + made.head.linear.bias, -1)
    tau = torch.sigmoid(z @ made.threshold.weight.T + made.threshold.bias) / EXPERTS
    a = (p - tau) * (p >= tau)
    routing = made(z)
    torch.testing.assert_close(routing.weights, a / a.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(routing.threshold, tau)
    assert 0 < routing.selected.float().mean() < 1


def test_adamole_keeps_the_largest_under_any_threshold():
    made = build("adamole_high", 4)
    routing = route(made, torch.tensor([[0.0, 1.0, 0.5, 0.0]]), others=1e4)
    assert routing.weights.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert (routing.threshold < routing.scores.max()).all()
    unsure = route(build("adamole", 4), torch.zeros(1, 4), others=1e4)
    assert unsure.weights.tolist() == [[0.25] * 4]


def projection(u: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """Sparsegen by bisection of tau, independent of sorting."""
    low, high = u.amin(-1, keepdim=True) - 1 + lam.clamp(max=0), u.amax(-1, keepdim=True)
    low = low - (1 - lam)
    for _ in range(200):
        tau = (low + high) / 2
        above = (torch.relu(u - tau) / (1 - lam)).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, tau, low), torch.where(above, high, tau)
    return torch.relu(u - low) / (1 - lam)


def test_sparsegen_is_the_projection_that_it_is_defined_as():
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    lam = 0.99 - 4 * torch.rand(300, 1, generator=generator, dtype=torch.float64) ** 2
    weights = sparsegen(u, 1 - lam)
    torch.testing.assert_close(weights, projection(u, lam), atol=1e-9, rtol=0)
    assert {int(n) for n in (weights > 0).sum(-1)} >= {1, 2, 3, 6}
    assert torch.equal(sparsegen(u, torch.full_like(lam, 1e-9)) > 0.5, u == u.amax(-1, keepdim=True))
    torch.testing.assert_close(sparsegen(u, torch.full_like(lam, 1e9)), torch.full_like(u, 1 / 6))


def test_sparsegen_is_as_exact_where_lambda_is_near_one():
    """1 - lambda goes to epsilon there; taken from a rounded lambda it would be off by many float32 roundings."""
    made = build("sparsegen", 6, epsilon=1e-3)
    generator = torch.Generator().manual_seed(0)
    u, f = 1e-3 * torch.randn(500, 6, generator=generator), 8 + 4 * torch.rand(500, 1, generator=generator)
    made.share(_Predicts(WIDTH, f))
    exact = sparsegen(u.double(), 1e-3 + F.softplus(-f.double()))
    assert ((exact > 0).sum(-1) > 1).float().mean() > 0.3
    torch.testing.assert_close(made.route([u, f]).weights.double(), exact, atol=1e-6, rtol=0)


class _Predicts(SparsityNetwork):
    """A network with a given output."""

    def __init__(self, width: int, output: torch.Tensor) -> None:
        super().__init__(width, 4)
        self.output = output

    def forward(self, product: torch.Tensor) -> torch.Tensor:
        return self.output


def test_sparsegen_predicts_lambda_with_the_shared_network():
    made = build("sparsegen")
    z = hidden()
    network = made._shared[0]
    f = torch.relu(z @ network.w1.weight.T + network.w1.bias) @ network.w2.weight.T + network.w2.bias
    routing = made(z)
    torch.testing.assert_close(routing.sparsity, 0.99 + F.logsigmoid(f), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routing.weights, sparsegen(z @ made.head.linear.weight.T, 1 - routing.sparsity))
    network.reset_parameters("identity")
    assert {b.item() for b in (*network.w1.bias, network.w2.bias)} == {-2.5}
    assert network.w1.weight.abs().max() <= WIDTH**-0.5 and network.w2.weight.abs().max() <= 256**-0.5
    torch.testing.assert_close(made(z).sparsity.mean().item(), -1.6, atol=0.2, rtol=0)


def test_the_shared_network_is_held_once_and_copied_with_the_model():
    options = ROUTERS["sparsegen"].Options()
    router_class = ROUTERS["sparsegen"]
    lonely = router_class(WIDTH, EXPERTS, options)
    with pytest.raises(RuntimeError, match="shared_network"):
        lonely(hidden())
    with pytest.raises(ValueError, match="width 12"):
        lonely.share(router_class.shared_network(WIDTH + 1, options))
    model = torch.nn.ModuleDict({"network": router_class.shared_network(WIDTH, options)})
    for name in ("first", "second"):
        model[name] = router_class(WIDTH, EXPERTS, options)
        model[name].share(model["network"])
    assert [name for name, _ in model["first"].named_parameters()] == ["head.linear.weight"]
    assert sum("w1.weight" in name for name in model.state_dict()) == 1
    copied = copy.deepcopy(model)
    for name in ("first", "second"):
        assert copied[name].reads()[-1] is copied["network"].w1
        assert copied[name].reads()[-1] is not model["network"].w1
    torch.nn.init.constant_(copied["network"].w2.bias, 50.0)
    assert copied["second"](hidden()).sparsity.min() > model["second"](hidden()).sparsity.max()


def top_2(u: torch.Tensor) -> torch.Tensor:
    p = softmax(u)
    return normalise(keep(p, top_k_mask(p, 2)))


def above_threshold(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    p = softmax(u)
    return threshold_weights(p, below_largest(torch.sigmoid(v) / 6, p))


GRADIENTS = {
    "top_k": (top_2, [(8, 6)]),
    "adamole": (above_threshold, [(8, 6), (8, 1)]),
    "sparsegen": (lambda u, f: sparsegen(u, 0.01 + F.softplus(-f)), [(8, 6), (8, 1)]),
    "shannon": (lambda u: tsallis_entropy(softmax(u)), [(8, 6)]),
    "tsallis": (lambda u: tsallis_entropy(softmax(u), 1.1), [(8, 6)]),
    "tsallis_half": (lambda u: tsallis_entropy(softmax(u), 0.5, normalised=False), [(8, 6)]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_finite_differences(name: str):
    function, shapes = GRADIENTS[name]
    assert torch.autograd.gradcheck(function, [float64(*shape) for shape in shapes])


@pytest.mark.parametrize("q", [0.5, 0.999, 1.0, 1.001, 1.1, 2.0, 50.0])
def test_entropy_follows_its_formula(q: float):
    p = softmax(3 * float64(50, 6)).detach()
    direct = -(p * p.log()).sum(-1) if q == 1 else (1 - p.pow(q).sum(-1)) / (q - 1)
    largest = math.log(6) if q == 1 else (1 - 6 ** (1 - q)) / (q - 1)
    torch.testing.assert_close(tsallis_entropy(p, q, normalised=False), direct)
    torch.testing.assert_close(tsallis_entropy(p, q), direct / largest)
    torch.testing.assert_close(tsallis_entropy(p.float(), q), (direct / largest).float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 2.0])
def test_entropy_at_its_ends_and_its_gradient_there(q: float):
    one_hot = torch.eye(8, requires_grad=True)
    entropy = tsallis_entropy(one_hot, q)
    assert entropy.tolist() == [0.0] * 8
    entropy.sum().backward()
    assert one_hot.grad.isfinite().all()
    for num_experts in (2, 3, 7, 8, 64):
        uniform = tsallis_entropy(torch.full((num_experts,), 1 / num_experts), q).item()
        assert 1 - 1e-6 < uniform <= 1
    assert tsallis_entropy(torch.ones(3, 1), q).tolist() == [0.0] * 3


def test_entropy_is_continuous_at_shannon_and_has_the_published_maxima():
    p = softmax(float64(20, 6)).detach().float()
    for q in (1 - 1e-6, 1 + 1e-6, 1 + 1e-12):
        torch.testing.assert_close(tsallis_entropy(p, q), tsallis_entropy(p, 1), atol=5e-6, rtol=0)
    for num_experts, largest in ((6, 1.6404), (8, 1.8775)):
        uniform = torch.full((num_experts,), 1 / num_experts)
        assert tsallis_entropy(uniform, 1.1, normalised=False).item() == pytest.approx(largest, abs=5e-5)
    with pytest.raises(UserError, match="above 0"):
        tsallis_entropy(p, 0.0)
