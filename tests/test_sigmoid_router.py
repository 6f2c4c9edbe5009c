"""The sigmoid router on its own: values, selection and gradients against the formulas."""

import pytest
import torch

from moa_peft.errors import UserError
from moa_peft.initialization import reset_linear
from moa_peft.routers import SigmoidRouter
from moa_peft.routers.sigmoid import SigmoidRouterOptions, select
from tests.models import randomise
from tests.router_kinds import EXPERTS, WIDTH, hidden


def router(**options: object) -> SigmoidRouter:
    made = SigmoidRouter(WIDTH, EXPERTS, SigmoidRouterOptions(**options))
    randomise(made, std=0.5)
    return made


def test_linear_head_is_sigmoid_of_a_linear_layer():
    r = router(hidden_per_expert=0)
    z = hidden()
    expected = torch.sigmoid(z @ r.head.linear.weight.T + r.head.linear.bias)
    torch.testing.assert_close(r(z).weights, expected)
    assert r(z).threshold is None and r(z).selected.all()


def test_swiglu_head_follows_its_formula():
    r = router(hidden_per_expert=3)
    z = hidden()
    w1, w2, w3 = r.head.w1, r.head.w2, r.head.w3
    assert w1.weight.shape == (3 * EXPERTS, WIDTH) and w2.weight.shape == (EXPERTS, 3 * EXPERTS)
    a = z @ w1.weight.T + w1.bias
    inner = a * torch.sigmoid(a) * (z @ w3.weight.T + w3.bias)
    torch.testing.assert_close(r(z).weights, torch.sigmoid(inner @ w2.weight.T + w2.bias), atol=1e-6, rtol=1e-5)


def test_learned_threshold_and_selection():
    r = router(threshold="learned", max_threshold=0.8, threshold_gradient="none")
    z = hidden()
    routing = r(z)
    tau = 0.8 * torch.sigmoid(z @ r.threshold.weight.T + r.threshold.bias)
    torch.testing.assert_close(routing.threshold, tau)
    assert 0 < routing.selected.float().mean() < 1, "the case must select some and drop some"
    assert torch.equal(routing.weights, routing.scores * (routing.scores >= routing.threshold))


def test_constant_threshold_has_no_parameters():
    r = router(threshold="constant", max_threshold=0.5)
    routing = r(hidden())
    assert r.threshold is None
    assert torch.equal(routing.threshold, torch.full_like(routing.threshold, 0.5))
    assert torch.equal(routing.selected, routing.scores >= 0.5)


@pytest.mark.parametrize("gradient", ["straight_through", "shifted"])
def test_threshold_gradients_equal_those_of_the_smooth_formulas(gradient: str):
    scores = torch.rand(6, EXPERTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tau = torch.full((6, 1), 0.5, dtype=torch.float64)
    upstream = torch.randn(6, EXPERTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores.requires_grad_()
    tau.requires_grad_()
    weights = select(scores, tau, gradient=gradient, temperature=0.1)
    ours = torch.autograd.grad((weights * upstream).sum(), [scores, tau])
    if gradient == "shifted":
        expected_value = torch.relu(scores - tau)
        expected = torch.autograd.grad((expected_value * upstream).sum(), [scores, tau])
    else:
        # d(w k) = k dw + w dk, with the hard k in the first and the slope of sigmoid((w - tau) / T) in the second.
        hard = (scores >= tau).double()
        soft = torch.sigmoid((scores - tau) / 0.1)
        slope = soft * (1 - soft) / 0.1
        expected_value = scores * hard
        expected = [upstream * (hard + scores * slope), -(upstream * scores * slope).sum(-1, keepdim=True)]
    assert torch.equal(weights, expected_value)
    for one, other in zip(ours, expected):
        torch.testing.assert_close(one, other)
        assert one.abs().sum() > 0


def test_the_released_selection_gives_the_threshold_no_gradient():
    r = router(threshold="learned", threshold_gradient="none", max_threshold=0.9)
    r(hidden()).weights.sum().backward()
    assert all(p.grad is None for p in r.threshold.parameters())
    assert r.head.w1.weight.grad.abs().sum() > 0
    assert [id(p) for p in r.frozen_parameters()] == [id(p) for p in r.threshold.parameters()]


def test_a_token_may_keep_no_expert_and_the_temperature_acts():
    scores = torch.full((1, EXPERTS), 0.2)
    assert not select(scores, torch.full((1, 1), 0.4), gradient="none", temperature=0.1).any()
    slopes = []
    for temperature in (0.1, 0.5):
        tau = torch.full((1, 1), 0.4, requires_grad=True)
        select(scores, tau, gradient="straight_through", temperature=temperature).sum().backward()
        slopes.append(tau.grad.item())
    assert slopes[0] != slopes[1]


def test_routing_is_float32_for_a_bf16_base():
    routing = router(threshold="learned")(hidden().bfloat16())
    assert routing.weights.dtype == routing.scores.dtype == routing.threshold.dtype == torch.float32


@pytest.mark.parametrize("init", ["identity", "reference", "normal"])
def test_biases_start_at_zero_and_weights_do_not(init: str):
    r = router(threshold="learned")
    r.reset_parameters(init)
    for name, p in r.named_parameters():
        assert p.abs().sum() == 0 if name.endswith("bias") else p.abs().min() < p.abs().max()
    linear = torch.nn.Linear(400, 400)
    reset_linear(linear, init)
    bound = 0.05 if init != "normal" else 1.0
    assert linear.weight.abs().max() <= bound
    assert abs(linear.weight.std().item() - (0.02 if init == "normal" else 0.05 / 3**0.5)) < 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_per_expert": -1}, "hidden_per_expert is -1"),
        ({"hidden_per_expert": 1.5}, "hidden_per_expert is 1.5"),
        ({"threshold": "median"}, "'none', 'constant', 'learned'"),
        ({"threshold_gradient": "soft"}, "'straight_through'"),
        ({"max_threshold": 0.0}, "max_threshold is 0.0"),
        ({"max_threshold": 1.5}, "max_threshold is 1.5"),
        ({"threshold_temperature": 0}, "threshold_temperature is 0"),
    ],
)
def test_wrong_options_say_what_is_allowed(options: dict[str, object], words: str):
    with pytest.raises(UserError, match=words):
        SigmoidRouterOptions(**options)
