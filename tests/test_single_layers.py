"""Mixtures at one linear layer against outputs of their released implementations: values, gradients, balance losses.

Each file of ``parity_data/single_layers`` holds an input ``x``, the parameters, the mixture's addition ``y``, a
``grad_y``, the gradients of ``(y * grad_y).sum()``, and for the two sparse methods the load-balancing loss with its
own gradients.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from moa_peft.experts import EXPERTS
from moa_peft.experts.base import SiteShape
from moa_peft.losses import LOSSES
from moa_peft.routers import ROUTERS, Router
from moa_peft.routing import Routing

DATA = Path(__file__).parent / "parity_data" / "single_layers"
VALUES = {"atol": 2e-6, "rtol": 1e-5}
# Gradients are as large as 40 here.
GRADIENTS = {"atol": 1e-5, "rtol": 1e-5}
ROUTER_OPTIONS = {
    "molora": ("softmax", {}),
    "hydralora": ("softmax", {}),
    "moe_lora_topk": ("top_k", {"bias": True}),
    "adamole": ("adamole", {"bias": True}),
}
BALANCE_OPTIONS = {"moe_lora_topk": {}, "adamole": {"importance": "above_threshold"}}


@dataclass
class Layer:
    """One method built from a file: its router, its experts, and the file's names of their parameters."""

    router: Router
    experts: nn.ModuleList
    parameters: dict[str, nn.Parameter]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        routing = self.router(x)
        columns = routing.weights.split([expert.copies for expert in self.experts], dim=-1)
        return sum(expert(x, weight) for expert, weight in zip(self.experts, columns)), routing


def load(method: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(str(DATA / f"{method}.safetensors"), "pt") as file:
        return dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def make(metadata: dict[str, str], tensors: dict[str, torch.Tensor], **options: object) -> Layer:
    width, num_experts = int(metadata["in_features"]), int(metadata["num_experts"])
    name, defaults = ROUTER_OPTIONS[metadata["method"]]
    if "top_k" in metadata:
        defaults = defaults | {"k": int(metadata["top_k"])}
    router = ROUTERS[name](width, num_experts, ROUTERS[name].Options(**(defaults | options)))
    shared = metadata.get("shared_A") == "true"
    expert_class = EXPERTS["hydra" if shared else "lora"]
    lora = expert_class.Options(target="q", rank=int(metadata["lora_rank"]), alpha=float(metadata["lora_alpha"]))
    shape = SiteShape(width, int(metadata["out_features"]))
    alone = [expert_class(shape, lora, num_experts)] if shared else []
    experts = nn.ModuleList(alone or [expert_class(shape, lora) for _ in range(num_experts)])
    parameters = {f"router.{key}": p for key, p in router.head.linear.named_parameters()}
    if name == "adamole":
        parameters |= {f"threshold.{key}": p for key, p in router.threshold.named_parameters()}
    if shared:
        parameters |= dict(experts[0].named_parameters())
    else:
        for index, expert in enumerate(experts):
            for part in ("A", "B"):
                parameters[f"lora_{part}.{index}.weight"] = getattr(expert, f"lora_{part}").weight
    layer = Layer(router, experts, parameters)
    ours = {id(p) for p in (*router.parameters(), *experts.parameters())}
    assert ours == {id(p) for p in parameters.values()}
    assert set(parameters) == {key.removeprefix("param.") for key in tensors if key.startswith("param.")}
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[f"param.{key}"])
    return layer


def balance(method: str, routing: Routing) -> torch.Tensor:
    loss_class = LOSSES["balance"]
    loss = loss_class(loss_class.Options(coefficient=1.0, **BALANCE_OPTIONS[method]))
    count = torch.tensor(float(routing.weights[..., 0].numel()))
    return loss.value(loss.sums(routing, None), count)


@pytest.mark.parametrize("method", ROUTER_OPTIONS)
def test_values_and_gradients_are_those_of_the_reference(method: str):
    metadata, tensors = load(method)
    layer = make(metadata, tensors)
    x = tensors["x"].clone().requires_grad_()
    y, routing = layer(x)
    torch.testing.assert_close(y, tensors["y"], **VALUES)
    (y * tensors["grad_y"]).sum().backward()
    torch.testing.assert_close(x.grad, tensors["grad_x"], **GRADIENTS)
    for key, parameter in layer.parameters.items():
        torch.testing.assert_close(parameter.grad, tensors[f"grad.{key}"], **GRADIENTS)
    sparse = method in BALANCE_OPTIONS
    assert bool(routing.selected.all()) is not sparse, "a sparse method must leave experts out in this case"


@pytest.mark.parametrize("method", BALANCE_OPTIONS)
def test_the_balance_loss_is_that_of_the_reference(method: str):
    metadata, tensors = load(method)
    layer = make(metadata, tensors)
    loss = balance(method, layer(tensors["x"])[1])
    torch.testing.assert_close(loss.reshape(1), tensors["load_balancing_loss"], **VALUES)
    loss.backward()
    reached = {key for key, parameter in layer.parameters.items() if parameter.grad is not None}
    assert reached == {key.removeprefix("lb_grad.") for key in tensors if key.startswith("lb_grad.")}
    for key in reached:
        torch.testing.assert_close(layer.parameters[key].grad, tensors[f"lb_grad.{key}"], **GRADIENTS)


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
def test_another_setting_of_the_router_is_another_value(method: str, change: dict[str, object]):
    metadata, tensors = load(method)
    y, _ = make(metadata, tensors, **change)(tensors["x"])
    assert (y - tensors["y"]).abs().max() > 100 * VALUES["atol"]


def test_files_are_there():
    assert {path.stem for path in DATA.glob("*.safetensors")} == set(ROUTER_OPTIONS)
