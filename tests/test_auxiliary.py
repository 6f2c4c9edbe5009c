"""Auxiliary losses outside the loss of the training loop: gradients, scales and logs."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import GradientState
from torch import nn
from torch.utils.checkpoint import checkpoint

from moa_peft.auxiliary import Auxiliary, add_loss, count_routers, loss_scale, read_losses
from moa_peft.losses import Loss, loss_values, parse_losses
from moa_peft.routing import Routing

WIDTH, EXPERTS, BLOCKS = 6, 4, 2
LOSSES: list[dict[str, Any]] = [
    {"type": "balance", "coefficient": 0.3},
    {"type": "z", "coefficient": 0.2, "reduction": "mean"},
]
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}


@pytest.fixture(autouse=True)
def no_state_of_accelerate() -> Iterator[None]:
    """Whatever ran before, no accelerator counts micro-batches."""
    before = dict(GradientState._shared_state)
    GradientState._shared_state.clear()
    yield
    GradientState._shared_state.clear()
    GradientState._shared_state.update(before)


class TopTwo(nn.Linear):
    """The layer that makes the logits."""

    def all_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())


class RoutedBlock(nn.Module):
    """Top-2 of elementwise experts, once per adapter."""

    def __init__(self, adapters: dict[str, list[dict[str, Any]]]) -> None:
        super().__init__()
        self.linears = nn.ModuleDict({name: TopTwo(WIDTH, EXPERTS) for name in adapters})
        self.experts = nn.ParameterDict({name: torch.randn(EXPERTS, WIDTH) for name in adapters})
        self.active = list(adapters)
        self.auxiliary = Auxiliary()
        self.checkpointing: bool | None = None
        for name, entries in adapters.items():
            self.auxiliary.add(name, "block", parse_losses(entries))

    def routers(self, name: str) -> dict[str, nn.Module]:
        return {"block": self.linears[name]}

    def route(self, name: str, x: torch.Tensor) -> Routing:
        logits = self.linears[name](x)
        scores = logits.softmax(-1)
        kept = scores >= scores.topk(2).values[..., -1:]
        return Routing(weights=scores * kept, scores=scores, logits=logits)

    def compute(self, x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        added = x
        for name in self.active:
            routing = self.auxiliary.attach(name, "block", self.route(name, x), tokens, training=self.training)
            added = added + torch.tanh(x) * (routing.weights @ self.experts[name])
        return added

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        if self.checkpointing is None:
            return self.compute(x, tokens)
        return checkpoint(self.compute, x, tokens, use_reentrant=self.checkpointing)  # type: ignore[return-value]


class Toy(nn.Module):
    """Embedding and routed blocks; predicts the labels of whole rows."""

    def __init__(self, **adapters: list[dict[str, Any]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        adapters = adapters or {"default": LOSSES}
        self.embedding = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(RoutedBlock(adapters) for _ in range(BLOCKS))
        self.double()
        for name in adapters:
            count_routers(self, name)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        tokens = None if attention_mask is None else attention_mask.bool()
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, tokens)
        logits = x if tokens is None else torch.where(tokens[..., None], x, 0.0)
        assert labels is not None
        return {"loss": F.cross_entropy(logits.mean(1), labels), "logits": logits.mean(1)}

    def set_checkpointing(self, how: str) -> "Toy":
        for block in self.blocks:
            block.checkpointing = CHECKPOINTING[how]
        return self


def batch(rows: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, 5, dtype=torch.long)
    mask[::2, 3:] = 0
    return {
        "input_ids": torch.randint(20, (rows, 5), generator=generator),
        "attention_mask": mask,
        "labels": torch.randint(WIDTH, (rows,), generator=generator),
    }


def rows_of(inputs: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] for name, tensor in inputs.items()}


def explicit(model: Toy, inputs: dict[str, torch.Tensor], name: str = "default") -> dict[str, torch.Tensor]:
    """The loss of the task, and the sum over routers of each auxiliary loss, as plain numbers with a graph."""
    found: dict[str, torch.Tensor] = {}
    blocks: Any = model.blocks
    losses: tuple[Loss, ...] = (
        blocks[0].auxiliary._attached[name]["block"].losses if blocks[0].auxiliary.names() else ()
    )
    attached = [block.auxiliary for block in blocks]
    try:
        for block in blocks:
            block.auxiliary = Auxiliary()
        tokens = inputs["attention_mask"].bool()
        x = model.embedding(inputs["input_ids"])
        for block in blocks:
            for loss, value in loss_values(losses, block.route(name, x), tokens).items():
                found[loss] = found.get(loss, torch.zeros(())) + value
            x = block.compute(x, tokens)
        return found | {"task": model(**inputs)["loss"]}
    finally:
        for block, auxiliary in zip(blocks, attached):
            block.auxiliary = auxiliary


def total(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return found["task"] + 0.3 * found["balance"] + 0.2 * found["z"] / BLOCKS


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected_gradients(loss: Callable[[Toy], torch.Tensor], model: Toy) -> dict[str, torch.Tensor]:
    """The gradients of an explicit loss of a copy of the model, without checkpointing."""
    model = copy.deepcopy(model).set_checkpointing("none")
    model.zero_grad()
    loss(model).backward()
    return gradients(model)


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-14)


def differ(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return any(not torch.allclose(found[name], expected[name], rtol=1e-4) for name in expected)


def test_add_loss_is_an_identity_with_a_second_gradient():
    weights = torch.randn(3, 4, requires_grad=True)
    other = torch.randn(2, requires_grad=True)
    result = add_loss(weights, other.square().sum(), 0.25)
    assert torch.equal(result, weights) and result.data_ptr() == weights.data_ptr()
    (result * 2).sum().backward()
    assert torch.equal(weights.grad, torch.full((3, 4), 2.0))
    assert torch.equal(other.grad, 0.25 * 2 * other)


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_gradients_are_those_of_the_explicit_loss(how):
    model = Toy().set_checkpointing(how)
    plain = expected_gradients(lambda m: explicit(m, batch())["task"], model)
    expected = expected_gradients(lambda m: total(explicit(m, batch())), model)
    assert differ(plain, expected), "the losses must matter"
    output = model(**batch())["loss"]
    torch.testing.assert_close(output, explicit(model, batch())["task"], rtol=0, atol=0)
    output.backward()
    check_same(gradients(model), expected)


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_accumulation_averages_the_losses_of_micro_batches(how):
    model = Toy().set_checkpointing(how)
    halves = [rows_of(batch(), slice(0, 2)), rows_of(batch(), slice(2, 4))]
    expected = expected_gradients(lambda m: sum(total(explicit(m, half)) for half in halves) / 2, model)
    with loss_scale(model, 0.5):
        for half in halves:
            (model(**half)["loss"] / 2).backward()
    check_same(gradients(model), expected)
    assert all(block.auxiliary.scale is None for block in model.blocks)


def test_two_forwards_before_one_backward():
    model = Toy().set_checkpointing("non-reentrant")
    halves = [rows_of(batch(), slice(0, 1)), rows_of(batch(), slice(1, 4))]
    expected = expected_gradients(lambda m: total(explicit(m, halves[0])) + total(explicit(m, halves[1])), model)
    first, second = (model(**half)["loss"] for half in halves)
    (first + second).backward()
    check_same(gradients(model), expected)


def test_halves_give_the_gradient_of_the_whole_for_a_mean_over_tokens():
    entries = [{"type": "z", "coefficient": 0.2}]
    whole, halved = Toy(default=entries), Toy(default=entries)
    whole(**batch())["loss"].backward()
    with loss_scale(halved, 0.5):
        for rows in (slice(0, 2), slice(2, 4)):
            (halved(**rows_of(batch(), rows))["loss"] / 2).backward()
    check_same(gradients(halved), gradients(whole))


def test_the_accumulation_of_an_accelerator_is_known():
    model = Toy()
    expected = expected_gradients(lambda m: total(explicit(m, batch())) / 4, model)
    assert not GradientState._shared_state
    (model(**batch())["loss"] / 4).backward()
    assert not GradientState._shared_state, "asking made the state"
    assert differ(gradients(model), expected)
    model.zero_grad()
    GradientState._shared_state["plugin_kwargs"] = {"num_steps": 4}
    assert GradientState().num_steps == 4
    (model(**batch())["loss"] / 4).backward()
    check_same(gradients(model), expected)


@pytest.mark.parametrize("case", ["eval", "no_grad", "frozen"])
def test_nothing_is_attached_where_nothing_is_learned(case):
    model = Toy()
    model.train(case != "eval")
    for parameter in model.parameters() if case == "frozen" else ():
        parameter.requires_grad_(False)
    with torch.set_grad_enabled(case != "no_grad"):
        loss = model(**batch())["loss"]
    if case == "eval":
        loss.backward()
        check_same(gradients(model), expected_gradients(lambda m: explicit(m, batch())["task"], model))
    assert read_losses(model) == {}


def test_a_routing_made_with_gradients_is_left_alone_where_there_are_none():
    block = Toy().blocks[0]
    routing = block.route("default", torch.randn(1, 2, WIDTH, dtype=torch.float64))
    with torch.no_grad():
        assert block.auxiliary.attach("default", "block", routing, None, training=True) is routing
    assert block.auxiliary.attach("default", "block", routing, None, training=True) is not routing


def test_the_log_holds_the_mean_over_forwards_of_the_sum_over_routers():
    model = Toy()
    parts = [rows_of(batch(), slice(0, 1)), rows_of(batch(), slice(1, 4))]
    expected = [explicit(model, part) for part in parts]
    for part in parts:
        model(**part)
    found = read_losses(model)
    assert set(found) == {"moa/balance", "moa/z"}
    assert found["moa/balance"] == pytest.approx(sum(e["balance"].item() for e in expected) / 2, rel=1e-9)
    assert found["moa/z"] == pytest.approx(sum(e["z"].item() for e in expected) / 2 / BLOCKS, rel=1e-9)
    assert read_losses(model) == {}, "what was read is forgotten"


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_recomputing_a_block_does_not_change_the_log(how):
    model = Toy().set_checkpointing(how)
    expected = explicit(model, batch())
    model(**batch())["loss"].backward()
    assert read_losses(model)["moa/balance"] == pytest.approx(expected["balance"].item(), rel=1e-9)


def test_adapters_do_not_mix():
    entries = {"a": [{"type": "z", "coefficient": 0.5}], "b": [{"type": "z", "coefficient": 2.0}], "c": []}
    model = Toy(**entries)
    for block in model.blocks:
        block.active = ["a"]
    model(**batch())
    assert set(read_losses(model)) == {"moa/a/z"}, "the other adapter did not run"
    for name, coefficient in (("a", 0.5), ("b", 2.0)):
        for block in model.blocks:
            block.active = [name]
        expected = expected_gradients(
            lambda m, n=name, c=coefficient: (e := explicit(m, batch(), n))["task"] + c * e["z"], model
        )
        model.zero_grad()
        model(**batch())["loss"].backward()
        check_same(gradients(model), expected)
    for block in model.blocks:
        del block.auxiliary["b"]
        assert "a" in block.auxiliary and "b" not in block.auxiliary and "c" not in block.auxiliary
        assert block.auxiliary.has_losses(["a", "b"]) and not block.auxiliary.has_losses(["b", "c"])
    read_losses(model)
    model(**batch())
    assert read_losses(model) == {}, "b has no losses any more"


def test_a_copied_layer_has_its_own_log():
    model = Toy()
    model(**batch())
    twin = copy.deepcopy(model)
    twin.train()(**batch())
    with loss_scale(twin, 0.5):
        assert model.blocks[0].auxiliary.scale is None
    assert read_losses(twin) and read_losses(twin) == {}
    assert set(read_losses(model)) == {"moa/balance", "moa/z"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph(backend):
    model = Toy()
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    for scale in (1.0, 0.5, 0.25):
        for one in (model, compiled):
            one.zero_grad()
            with loss_scale(one, scale):
                one(**batch())["loss"].backward()
        check_same(gradients(compiled._orig_mod), gradients(model))
        found, expected = read_losses(compiled), read_losses(model)
        assert expected and found == pytest.approx(expected, rel=1e-9)
    torch._dynamo.reset()
