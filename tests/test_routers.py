"""What holds for every router: invariants under difficult logits, precision, gradients, options."""

import pytest
import torch

from moa_peft.entropy import tsallis_entropy
from moa_peft.errors import UserError
from moa_peft.routers import ROUTERS
from tests.router_kinds import EXPERTS, KINDS, WIDTH, build, hidden, route

SUM_TO_ONE = {"softmax", "top_k", "top_k_noisy", "adamole", "adamole_high", "sparsegen"}


def difficult_logits(num_experts: int) -> torch.Tensor:
    random = torch.randn(200, num_experts, generator=torch.Generator().manual_seed(0))
    ties = random.round()
    one_hot = torch.eye(num_experts)
    zero = torch.zeros(1, num_experts)
    return torch.cat(
        [random, 20 * random, 1e4 * random, ties, 1e3 * ties, one_hot, 1e30 * one_hot, zero, zero + 1e30, zero - 1e4]
    )


@pytest.mark.parametrize("num_experts", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_invariants_hold_for_difficult_logits(kind: str, num_experts: int):
    made = build(kind, num_experts)
    logits = difficult_logits(num_experts)
    for others in (None, -1e4, 1e4):
        routing = route(made, logits, others=others)
        for name in ("weights", "scores", "threshold", "logits", "sparsity"):
            value = getattr(routing, name)
            assert value is None or (value.dtype == torch.float32 and value.isfinite().all()), name
        assert (routing.weights >= 0).all() and (routing.scores >= 0).all()
        if not kind.startswith("sigmoid"):
            assert routing.selected.any(-1).all(), "a token lost every expert"
        if kind in SUM_TO_ONE and num_experts > 1:
            torch.testing.assert_close(routing.weights.sum(-1), torch.ones(len(logits)))
        if made.scores_are_probabilities:
            torch.testing.assert_close(routing.scores.sum(-1), torch.ones(len(logits)))
        if kind.startswith("top_k"):
            assert (routing.selected.sum(-1) == min(2, num_experts)).all()
        if kind == "dynmole":
            assert (routing.selected.sum(-1) >= min(2, num_experts)).all()
        if kind in ("top_k_unrenormalised", "top_p", "dynmole"):
            torch.testing.assert_close(routing.weights, routing.scores * routing.selected)
        assert kind == "constant" or torch.equal(routing.logits, logits)
        entropy = tsallis_entropy(routing.scores, 1.1) if made.scores_are_probabilities else torch.zeros(1)
        assert ((entropy >= 0) & (entropy <= 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_neutral_weight_is_the_mean_weight_at_zero_logits(kind: str):
    for num_experts in (2, 3, 8):
        made = build(kind, num_experts)
        weights = route(made, torch.zeros(1, num_experts), others=0.0).weights
        expected = made.neutral_weight(num_experts, made.options)
        if kind == "sigmoid_sparse":
            assert expected == 0.5
        else:
            assert weights.mean().item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_evaluation_repeats_itself(kind: str):
    made = build(kind)
    if kind != "constant":
        assert torch.equal(made(hidden()).weights, made(hidden()).weights)
        made.train()
        routing = made(hidden())
        upstream = torch.randn(routing.weights.shape, generator=torch.Generator().manual_seed(1))
        (routing.weights * upstream).sum().backward()
    network = made._shared[0] if made.shared_network(WIDTH, made.options) is not None else torch.nn.Module()
    for name, parameter in [*made.named_parameters(), *network.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_all_after_the_products_is_float32_for_a_bf16_input(kind: str):
    made = build(kind)
    routing = made(hidden().bfloat16())
    assert routing.weights.shape == (2, 7, EXPERTS)
    values = [routing.weights, routing.scores, routing.threshold, routing.logits, routing.sparsity]
    assert all(value is None or value.dtype == torch.float32 for value in values)
    products = [linear(hidden().bfloat16()) for linear in made.reads()]
    assert all(product.dtype == torch.bfloat16 for product in products)
    widened = made.route([product.float() for product in products]).weights
    assert torch.equal(routing.weights, widened.expand_as(routing.weights))


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_without_a_break(kind: str):
    made = build(kind)
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    assert torch.equal(compiled(hidden()).weights, made(hidden()).weights)


@pytest.mark.parametrize("kind", [*KINDS, "straight_through"])
def test_no_gradient_reaches_a_weight_of_zero_where_experts_may_be_left_out(kind: str):
    sparse = kind == "straight_through"
    made = build("sigmoid_sparse", threshold_gradient=kind) if sparse else build(kind)
    made.train()

    def weights() -> torch.Tensor:
        torch.manual_seed(0)
        return made(hidden()).weights

    zeros = weights() == 0
    if not made.may_skip(with_gradient=False):
        assert not zeros.any()
        return
    assert zeros.any()
    gradients = []
    for of_zeros in (0.0, 1.0, float("1e6")):
        upstream = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(1))
        made.zero_grad()
        weights().backward(torch.where(zeros, of_zeros, upstream))
        gradients.append(torch.cat([p.grad.flatten() for p in made.parameters()]))
    same = all(torch.equal(gradients[0], other) for other in gradients)
    assert same is made.may_skip(with_gradient=True)
    assert same is not sparse


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("constant", "sigmoid", "sigmoid_sparse")])
def test_heads_take_a_hidden_layer_no_bias_and_a_spread(kind: str):
    made = build(kind, hidden_per_expert=2, bias=False, init_std=0.3)
    assert made.head.w1.weight.shape == (2 * EXPERTS, WIDTH)
    assert not [name for name, _ in made.head.named_parameters() if name.endswith("bias")]
    assert made(hidden()).weights.shape == (2, 7, EXPERTS)
    made.reset_parameters("identity")
    assert abs(made.head.w1.weight.std().item() - 0.3) < 0.06
    plain = build(kind, bias=True)
    plain.reset_parameters("identity")
    assert plain.head.linear.bias.abs().sum() == 0 and plain.head.linear.weight.abs().max() <= WIDTH**-0.5


def test_constant_weights_have_no_parameters_and_follow_their_module():
    made = build("constant")
    assert made.reads() == [] and not list(made.parameters()) and not made.state_dict()
    assert made.route([]).weights.tolist() == pytest.approx([0.3] * EXPERTS)
    assert torch.equal(made.bfloat16().route([]).weights, build("constant").route([]).weights)
    assert made.to("meta").route([]).weights.device.type == "meta"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("softmax", {"bias": 1}, "router.bias is 1; it must be true or false"),
        ("softmax", {"scaled": "yes"}, "router.scaled is 'yes'"),
        ("softmax", {"init_std": 0.0}, "router.init_std is 0.0"),
        ("softmax", {"hidden_per_expert": -2}, "hidden_per_expert is -2"),
        ("top_k", {"k": 0}, "router.k is 0; it must be an integer of at least 1"),
        ("top_k", {"k": 1}, "the router learns nothing"),
        ("top_k", {"noise": None}, "router.noise is None"),
        ("top_k", {"renormalise": 0}, "router.renormalise is 0"),
        ("top_p", {"p": 0.0}, r"router.p is 0.0; it must be a number in \(0.0, 1.0\]"),
        ("top_p", {"p": 1.1}, "router.p is 1.1"),
        ("adamole", {"max_threshold": 1.5}, "router.max_threshold is 1.5"),
        ("adamole", {"bias": "no"}, "router.bias is 'no'"),
        ("dynmole", {"top_p": -0.1}, "router.top_p is -0.1"),
        ("dynmole", {"keep_top_k": 1.5}, "router.keep_top_k is 1.5"),
        ("dynmole", {"entropy_threshold": 2.0}, "router.entropy_threshold is 2.0"),
        ("dynmole", {"entropy_index": 0}, "router.entropy_index is 0"),
        ("sparsegen", {"hidden": 0}, "router.hidden is 0"),
        ("sparsegen", {"epsilon": 1.0}, "router.epsilon is 1.0"),
        ("constant", {"weight": float("nan")}, "router.weight is nan"),
    ],
)
def test_wrong_options_of_the_other_routers_say_what_is_allowed(name: str, options: dict[str, object], words: str):
    with pytest.raises(UserError, match=words):
        ROUTERS[name].Options(**options)


@pytest.mark.parametrize(("name", "option"), [("top_k", "k"), ("dynmole", "keep_top_k")])
def test_more_experts_than_there_are_cannot_be_kept(name: str, option: str):
    options = ROUTERS[name].Options(**{option: 3})
    ROUTERS[name](WIDTH, 3, options)
    with pytest.raises(UserError, match=f"router.{option} is 3.*2 experts.*at most 2"):
        ROUTERS[name](WIDTH, 2, options)


def test_unknown_router_lists_the_known_ones():
    with pytest.raises(UserError, match="sigmoid"):
        ROUTERS["softmin"]
