"""Mixtures at one linear layer against outputs of their released implementations, and of one written here.

`tests.parity` says what such a file holds. Each is compared through the layer that trains, on both of its paths.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moa_peft import moa_status
from tests import parity

DATA = Path(__file__).parent / "parity_data" / "single_layers"
SPARSE = ("moe_lora_topk", "adamole")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One file of other sizes; what is None is neither in its metadata nor among its tensors.

    Attributes:
        method: whose formula.
        shape: of x without its width.
        width: of x.
        out: width of y.
        experts: their number.
        rank: of their factors.
        alpha: the factors' product is scaled by ``alpha / rank``.
        bias: whether the router has one.
        k: experts that a token keeps.
        max_threshold: upper bound of the threshold.
    """

    method: str
    shape: tuple[int, ...] = (2, 7)
    width: int = 10
    out: int = 14
    experts: int = 4
    rank: int = 3
    alpha: int | None = 5
    bias: bool = False
    k: int | None = None
    max_threshold: float | None = None


CASES = [
    Case(method="molora", experts=6, rank=1, alpha=16, width=33, out=5),
    Case(method="molora", shape=(11,), experts=2, alpha=None, bias=True),
    Case(method="hydralora", experts=7, rank=5, alpha=1, shape=(3, 1, 6)),
    Case(method="hydralora", experts=2, rank=12, alpha=None, bias=True, width=64, out=96),
    Case(method="moe_lora_topk", experts=8, k=3, bias=True, rank=6),
    Case(method="moe_lora_topk", experts=3, alpha=None, shape=(9,)),
    # Experts this large leave out the tokens that have no weight for them.
    Case(method="moe_lora_topk", experts=8, k=2, bias=True, rank=32, alpha=64, shape=(3, 40), width=48),
    Case(method="adamole", experts=3, bias=True, max_threshold=0.3, alpha=9),
    Case(method="adamole", experts=6, rank=2, alpha=None, shape=(4, 5)),
    Case(method="adamole", experts=4, rank=33, bias=True, max_threshold=0.2, shape=(2, 50)),
]


def contents(case: Case, *, seed: int = 0) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a file, computed in float64 from the formulas alone."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).double().requires_grad_()

    shared, experts = case.method == "hydralora", range(case.experts)
    inputs = {"router.weight": random(case.experts, case.width, scale=case.width**-0.5)}
    inputs |= {"router.bias": random(case.experts)} if case.bias else {}
    inputs |= {"lora_A.weight" if shared else f"lora_A.{i}.weight": random(case.rank, case.width) for i in experts}
    inputs |= {f"lora_B.{i}.weight": random(case.out, case.rank) for i in experts}
    if case.method == "adamole":
        inputs |= {"threshold.weight": random(1, case.width), "threshold.bias": random(1)}
    x = inputs["x"] = random(*case.shape, case.width)
    grad_y = random(*case.shape, case.out).detach()

    p_E = (x @ inputs["router.weight"].T + inputs.get("router.bias", 0)).softmax(-1)
    above_E = p_E
    if case.method == "moe_lora_topk":
        weights_E = torch.where(p_E >= p_E.topk(case.k or 2).values[..., -1:], p_E, 0)
    elif case.method == "adamole":
        tau = torch.sigmoid(x @ inputs["threshold.weight"].T + inputs["threshold.bias"])
        above_E = p_E - tau * (case.max_threshold or 1 / case.experts)
        weights_E = above_E.clamp(min=0)
    else:
        weights_E = p_E
    kept_E, weights_E = weights_E > 0, weights_E / weights_E.sum(-1, keepdim=True)
    scale = (case.alpha or case.rank) / case.rank
    y = torch.zeros(*case.shape, case.out).double()
    for i in experts:
        read = inputs["lora_A.weight" if shared else f"lora_A.{i}.weight"]
        y = y + weights_E[..., i : i + 1] * scale * (x @ read.T @ inputs[f"lora_B.{i}.weight"].T)

    grads = torch.autograd.grad((y * grad_y).sum(), list(inputs.values()), retain_graph=True)
    found = {"y": y.detach(), "grad_y": grad_y, "x": x.detach()}
    found |= {"grad_x" if name == "x" else f"grad.{name}": grad for name, grad in zip(inputs, grads)}
    found |= {f"param.{name}": value.detach() for name, value in inputs.items() if name != "x"}
    if case.method in SPARSE:
        tokens = tuple(range(len(case.shape)))
        loss = case.experts * (kept_E.double().mean(tokens) * above_E.mean(tokens)).sum()
        reached = {name: value for name, value in inputs.items() if name.startswith(("router", "threshold"))}
        found["load_balancing_loss"] = loss.detach().reshape(1)
        found |= {f"lb_grad.{name}": g for name, g in zip(reached, torch.autograd.grad(loss, list(reached.values())))}
    metadata = {"method": case.method, "lora_alpha": case.alpha, "top_k": case.k, "max_threshold": case.max_threshold}
    said = {key: str(value) for key, value in metadata.items() if value is not None}
    return said, {name: value.float().contiguous() for name, value in found.items()}


def write(path: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, str(path), metadata=metadata)
    return path


def released(method: str) -> tuple[parity.Contents, parity.Contents]:
    return parity.load(DATA / f"{method}.safetensors")


def exceeded(rows: list[parity.Comparison]) -> set[str]:
    return {row.quantity for row in rows if row.of_tolerance > 1}


@pytest.mark.parametrize("method", parity.LAYER_METHODS)
def test_values_gradients_and_losses_are_those_of_the_reference(method: str):
    rows = parity.compare(DATA / f"{method}.safetensors")
    wanted = {"y", "gradient of x", "gradients"} | ({"balance loss", "its gradients"} if method in SPARSE else set())
    assert {row.quantity for row in rows} == {f"{name}, {path}" for name in wanted for path in ("fused", "plain")}
    assert not exceeded(rows)
    # The tolerance leaves room for larger sizes than these.
    assert max(row.of_tolerance for row in rows) < 0.2


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}-{case.experts}x{case.rank}")
def test_files_of_other_sizes_and_settings(case: Case, tmp_path: Path):
    rows = parity.compare(write(tmp_path / "case.safetensors", *contents(case)))
    assert not exceeded(rows)
    assert len(rows) == (10 if case.method in SPARSE else 6)


def test_the_fused_rows_are_of_the_fused_path():
    for case in CASES:
        metadata, tensors = map(parity.Contents, contents(case))
        model, _ = parity.build_layer(parity.layer_config(metadata, tensors), tensors)
        parts = {part.part: part for part in moa_status(model).parts if part.part != "mlp"}
        assert all(part.path == "fused" for part in parts.values())
        assert any(part.skips for part in parts.values()) == (case.rank >= 32)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("molora", {"scaled": True}),
        ("hydralora", {"scaled": True}),
        ("moe_lora_topk", {"renormalise": False}),
        ("moe_lora_topk", {"k": 3}),
        ("adamole", {"max_threshold": 0.19}),
    ],
)
def test_another_setting_of_the_router_is_another_value(method: str, change: dict[str, object], monkeypatch):
    metadata, tensors = released(method)
    original = parity.layer_config

    def changed(*args: Any, **kwargs: Any) -> Any:
        config: Any = original(*args, **kwargs)
        config.router |= change
        return config

    monkeypatch.setattr(parity, "layer_config", changed)
    assert exceeded(parity.compare_layer(metadata, tensors)) >= {"y, fused", "y, plain"}


@pytest.mark.parametrize("name", ["y", "grad_x", "grad.lora_B.2.weight", "load_balancing_loss", "lb_grad.router.bias"])
def test_an_error_of_one_permille_in_one_tensor_is_seen(name: str):
    metadata, tensors = released("adamole")
    tensors[name] = tensors[name] * 1.001
    assert len(exceeded(parity.compare_layer(metadata, tensors))) == 2


def test_a_balance_loss_without_gradients_is_compared_alone():
    metadata, tensors = released("moe_lora_topk")
    for name in [name for name in tensors if name.startswith("lb_grad.")]:
        del tensors[name]
    rows = parity.compare_layer(metadata, tensors)
    assert [row.quantity for row in rows[3:5]] == ["balance loss, fused", "y, plain"] and not exceeded(rows)


def test_metadata_that_say_something_else_are_seen():
    metadata, tensors = released("molora")
    metadata["lora_alpha"] = "9"
    assert "y, fused" in exceeded(parity.compare_layer(metadata, tensors))


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"method": "vera"}, {}, "name neither the family of a whole model nor the method.*'vera'"),
        ({"num_experts": "4"}, {}, "num_experts is 4 in its metadata, and 5 by its tensors"),
        ({"lora_alpha": "eight"}, {}, "lora_alpha is 'eight' in its metadata; it must be a number"),
        ({"top_k": "6"}, {}, "k is 6"),
        ({"method": "molora"}, {"param.lora_A.1.weight": None}, "lora_A.1.weight is missing, not .4, 24."),
        ({"method": "hydralora"}, {}, r"lora_A.1.weight is .4, 24., not there"),
        ({}, {"param.lora_B.0.weight": torch.zeros(20, 3)}, "lora_B.0.weight is .20, 3., not .20, 4."),
        ({}, {"param.noise.weight": torch.zeros(5, 24)}, "noise.weight is .5, 24., not there"),
        ({}, {"grad_y": None}, "it holds no 'grad_y'"),
        ({}, {"grad.router.bias": None}, "it holds no 'grad.router.bias'"),
        ({}, {"grad_x": torch.zeros(9, 24)}, r"gradient of x, fused has shape \[9, 24\] in the file"),
    ],
)
def test_files_that_are_no_such_layer_say_so(metadata, tensors, message: str, tmp_path: Path):
    said, found = released("moe_lora_topk")
    changed = {key: value for key, value in (found | tensors).items() if value is not None}
    path = write(tmp_path / "file.safetensors", dict(said | metadata), changed)
    with pytest.raises(ValueError, match=message):
        parity.compare(path)


def test_files_are_there():
    assert {path.stem for path in DATA.glob("*.safetensors")} == set(parity.LAYER_METHODS)
