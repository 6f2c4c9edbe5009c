"""The written-out gradients of the prompt experts equal those that autograd finds for their own forward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moa_peft import prompt_addition
from moa_peft.experts import PromptExpert
from moa_peft.experts.base import SiteShape
from moa_peft.experts.prompt import PromptOptions
from moa_peft.prompt_addition import (
    PromptState,
    fold,
    product_dtype,
    recomputed_with_prompts,
    summed_with_prompts,
    with_prompts,
)

BATCH, TOKENS, WIDTH, LENGTH = 3, 5, 8, 6
SCALING = 0.4
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True, params=[0, 128], ids=["in_place", "apart"])
def few_tokens(request, monkeypatch):
    """Both ways of adding, whatever the number of tokens."""
    monkeypatch.setattr(prompt_addition, "FEW_TOKENS", request.param)


@dataclass
class Case:
    """What `recomputed_with_prompts` is given; every tensor is a leaf with a name."""

    experts: list[PromptExpert]
    tensors: dict[str, torch.Tensor]
    num_reads: int

    @property
    def query_BHTK(self) -> torch.Tensor:
        query = self.tensors["query"]
        return query if self.tensors["attended"].shape[1] == query.shape[2] else query.transpose(1, 2)

    @property
    def states(self) -> list[PromptState]:
        kept = self.tensors
        return [
            PromptState(expert, kept[f"key{i}"].transpose(0, 1), kept[f"value{i}"].transpose(0, 1), kept[f"weight{i}"])
            for i, expert in enumerate(self.experts)
        ]

    @property
    def reads(self) -> list[torch.Tensor]:
        return [self.tensors[f"read{i}"] for i in range(self.num_reads)]

    def leaves(self) -> dict[str, torch.Tensor]:
        return self.tensors | {f"gate{i}": expert.gate for i, expert in enumerate(self.experts)}


def make_case(
    *,
    heads: tuple[int, int] = (4, 2),
    experts: int = 1,
    reads: int = 2,
    heads_first: bool = False,
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.float32,
    prompt_dtype: torch.dtype | None = None,
    query_dtype: torch.dtype | None = None,
    weight_tokens: int | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(to).requires_grad_()

    num_heads, num_kv_heads = heads
    query_shape = (num_heads, tokens) if heads_first else (tokens, num_heads)
    tensors = {
        "attended": leaf(BATCH, tokens, num_heads, WIDTH),
        "query": leaf(BATCH, *query_shape, WIDTH, to=query_dtype or dtype),
    }
    made = []
    for index in range(experts):
        shape = SiteShape(in_features=num_heads * WIDTH, out_features=num_heads * WIDTH, num_heads=num_heads)
        expert = PromptExpert(shape, PromptOptions(length=LENGTH + index))
        with torch.no_grad():
            expert.gate.copy_(torch.randn(expert.gate.shape, generator=generator))
        made.append(expert)
        for name in ("key", "value"):
            tensors[f"{name}{index}"] = leaf(LENGTH + index, num_kv_heads, WIDTH, to=prompt_dtype or dtype)
        tensors[f"weight{index}"] = leaf(BATCH, weight_tokens or tokens, 1, to=torch.float32)
    for index in range(reads):
        tensors[f"read{index}"] = leaf(2 + index, num_heads * WIDTH, to=torch.float32)
    return Case(made, tensors, reads)


def ours(case: Case) -> list[torch.Tensor]:
    results = recomputed_with_prompts(case.tensors["attended"], case.query_BHTK, case.states, SCALING, case.reads)
    return [result for result in results if result is not None]


def reference(case: Case) -> list[torch.Tensor]:
    total = with_prompts(case.tensors["attended"], case.query_BHTK, case.states, SCALING)
    if not case.reads:
        return [total]
    return [total, F.linear(total.flatten(-2), torch.cat(case.reads).to(total.dtype))]


def upstream(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]


def differentiate(outputs: Sequence[torch.Tensor], leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(outputs, list(wanted.values()), upstream(outputs), allow_unused=True)
    return {name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None}


def assert_as_on_the_plain_path(case: Case, **tolerance: float) -> None:
    """Values and gradients are those of the plain path, and no gradient is missing or too many."""
    tolerance = tolerance or CLOSE
    values, expected = ours(case), reference(case)
    torch.testing.assert_close(values, expected, **tolerance)
    found, gradients = differentiate(values, case.leaves()), differentiate(expected, case.leaves())
    assert set(found) == set(gradients) == {name for name, leaf in case.leaves().items() if leaf.requires_grad}
    for name, gradient in gradients.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(found[name], gradient, **tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("heads_first", [False, True], ids=["tokens_first", "heads_first"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize(("experts", "reads"), [(1, 0), (1, 1), (2, 2), (3, 0)])
def test_values_and_gradients(heads, heads_first, experts, reads):
    assert_as_on_the_plain_path(make_case(heads=heads, heads_first=heads_first, experts=experts, reads=reads))


@pytest.mark.parametrize("tokens", [1, 4])
def test_one_token_and_as_many_tokens_as_heads(tokens):
    case = make_case(tokens=tokens, experts=2, heads_first=True)
    assert_as_on_the_plain_path(case)


def test_one_routing_weight_for_a_sequence():
    assert_as_on_the_plain_path(make_case(weight_tokens=1))


def test_queries_that_are_a_slice_of_a_wider_tensor():
    case = make_case(heads=(4, 4), experts=2)
    fused = torch.randn(BATCH, TOKENS, 3 * 4 * WIDTH, requires_grad=True)
    case.tensors["query"] = fused[..., : 4 * WIDTH].view(BATCH, TOKENS, 4, WIDTH)
    assert_as_on_the_plain_path(case)


def test_attention_that_returns_a_strided_tensor():
    case = make_case()
    case.tensors["attended"] = torch.randn(BATCH, 4, TOKENS, WIDTH, requires_grad=True).transpose(1, 2)
    assert_as_on_the_plain_path(case)


@pytest.mark.parametrize(
    "frozen",
    [
        ("gate0", "gate1"),
        ("gate0",),
        ("query",),
        ("attended",),
        ("attended", "query"),
        ("key0", "value0", "key1", "value1"),
        ("weight0", "weight1"),
        ("read0",),
        ("attended", "query", "key0", "value0", "key1", "value1", "weight0", "weight1", "read0", "read1", "gate0"),
    ],
    ids="-".join,
)
def test_whatever_needs_no_gradient(frozen):
    case = make_case(experts=2)
    for name in frozen:
        case.leaves()[name].requires_grad_(False)
    assert_as_on_the_plain_path(case)


def test_a_closed_gate_adds_nothing_and_can_open():
    case = make_case()
    torch.nn.init.zeros_(case.experts[0].gate)
    total, _ = ours(case)
    assert torch.equal(total, case.tensors["attended"])
    found, expected = differentiate(ours(case), case.leaves()), differentiate(reference(case), case.leaves())
    torch.testing.assert_close(found, expected, **CLOSE)
    assert found["gate0"].abs().min() > 0 and not found["weight0"].any()


def test_only_the_sum_is_used():
    case = make_case()
    found = differentiate(ours(case)[:1], case.leaves())
    expected = differentiate(reference(case)[:1], case.leaves())
    torch.testing.assert_close({name: found[name] for name in expected}, expected, **CLOSE)
    assert not any(found[name].any() for name in set(found) - set(expected))


def test_only_what_is_read_is_used():
    case = make_case()
    found, expected = (differentiate(run(case)[1:], case.leaves()) for run in (ours, reference))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_large_scores():
    case = make_case()
    with torch.no_grad():
        case.tensors["query"].mul_(1e4)
    values = ours(case)
    gradients = differentiate(values, case.leaves())
    assert all(tensor.isfinite().all() for tensor in [*values, *gradients.values()])
    torch.testing.assert_close(values, reference(case), **CLOSE)


def test_nothing_that_belongs_to_others_is_changed():
    case = make_case(experts=2)
    before = {name: leaf.detach().clone() for name, leaf in case.leaves().items()}
    values = ours(case)
    kept = [value.detach().clone() for value in values]
    given = upstream(values)
    leaves = list(case.leaves().values())
    first = torch.autograd.grad(values, leaves, given, retain_graph=True)
    second = torch.autograd.grad(values, leaves, given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, upstream(values), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=True))
    assert all(torch.equal(leaf, before[name]) for name, leaf in case.leaves().items())


def test_nothing_but_the_inputs_is_kept():
    case = make_case(experts=2)
    kept: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        ours(case)
    assert kept and kept <= {leaf.data_ptr() for leaf in case.leaves().values()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    case = make_case(experts=2)

    def run(attended: torch.Tensor) -> Any:
        return recomputed_with_prompts(attended, case.query_BHTK, case.states, SCALING, case.reads)

    outputs = checkpoint(run, case.tensors["attended"], use_reentrant=reentrant)
    assert outputs is not None
    torch.autograd.backward(outputs, upstream(outputs))
    found = {name: leaf.grad for name, leaf in case.leaves().items()}
    torch.testing.assert_close(found, differentiate(reference(case), case.leaves()), **CLOSE)


class Holder(torch.nn.Module):
    """An expert inside a model."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.expert = case.experts[0]
        self.case = case

    def forward(self) -> list[torch.Tensor]:
        return ours(self.case)


def test_gradients_go_to_the_parameters_given_in_the_forward():
    case = make_case()
    holder = Holder(case)
    other = torch.randn_like(case.experts[0].gate).requires_grad_()
    outputs = torch.func.functional_call(holder, {"expert.gate": other}, ())
    torch.autograd.backward(outputs, upstream(outputs))
    assert case.experts[0].gate.grad is None and other.grad is not None
    with torch.no_grad():
        case.experts[0].gate.copy_(other)
    torch.testing.assert_close(other.grad, differentiate(reference(case), case.leaves())["gate0"], **CLOSE)


class Doubled(PromptExpert):
    """A user's expert with a forward of its own."""

    def forward(self, *args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return 2 * super().forward(*args, **kwargs)


def test_a_subclass_keeps_its_own_forward():
    case = make_case(experts=2)
    single = ours(case)[0].detach()
    case.experts[1].__class__ = Doubled
    assert_as_on_the_plain_path(case)
    assert not torch.allclose(ours(case)[0], single, atol=1e-2)


# Half precision


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_half_precision_base(dtype):
    """As near to float32 as the plain path, or nearer."""
    case, full = make_case(experts=2, dtype=dtype), make_case(experts=2)
    with torch.no_grad():
        for name, tensor in full.tensors.items():
            tensor.copy_(case.tensors[name])
    exact, values, plain = reference(full), ours(case), reference(case)
    assert [value.dtype for value in values] == [dtype, dtype]
    expected, found, rounded = (
        differentiate(out, c.leaves()) for out, c in ((exact, full), (values, case), (plain, case))
    )
    assert set(found) == set(expected)
    assert {name: g.dtype for name, g in found.items()} == {name: leaf.dtype for name, leaf in case.leaves().items()}
    limit = 4 * torch.finfo(dtype).eps
    for value, other, right in zip(values, plain, exact, strict=True):
        assert relative_error(value, right) <= max(1.2 * relative_error(other, right), limit / 4)
    for name in expected:
        assert relative_error(found[name], expected[name]) <= max(
            1.5 * relative_error(rounded[name], expected[name]), limit
        ), name


@pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])
@pytest.mark.parametrize(
    ("attended", "query", "prompt"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_autocast(attended, query, prompt, inside):
    case = make_case(experts=2, dtype=attended, query_dtype=query, prompt_dtype=prompt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product_dtype(case.query_BHTK) == torch.bfloat16
        values, expected = ours(case), reference(case)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        found, gradients = (differentiate(out, case.leaves()) for out in (values, expected))
    assert [value.dtype for value in values] == [value.dtype for value in expected]
    assert set(found) == set(gradients) == set(case.leaves())
    for name, leaf in case.leaves().items():
        assert found[name].dtype == leaf.dtype
        assert relative_error(found[name], gradients[name]) < 0.03, name
    for value, right in zip(values, expected, strict=True):
        assert relative_error(value, right) < 0.01


# Without gradients


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_without_gradients(dtype, tokens):
    case = make_case(experts=2, tokens=tokens, dtype=dtype)
    query = case.query_BHTK
    assert product_dtype(query) == dtype
    with torch.no_grad():
        prompts = [
            (*fold(state.key_HPK, state.value_HPK, expert.gate, SCALING, dtype), state.weight_BT1)
            for state, expert in zip(case.states, case.experts, strict=True)
        ]
        total = summed_with_prompts(case.tensors["attended"], query, prompts)
        expected = with_prompts(case.tensors["attended"], query, case.states, SCALING)
    assert total.dtype == dtype and not total.requires_grad
    assert relative_error(total, expected) < (1e-5 if dtype == torch.float32 else 0.01)
    assert relative_error(total, case.tensors["attended"].detach()) > 0.1
