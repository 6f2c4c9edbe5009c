"""Compare mixtures with outputs of their released reference implementations.

    python -m tests.parity FILE...

Each FILE is a safetensors file whose metadata say what is in it: a whole model (``family``) with Soft or Sparse MoA,
or a mixture at one linear layer (``method``: molora, hydralora, moe_lora_topk or adamole). It is built from the
metadata and the shapes of the tensors, its weights are taken from the file, and the largest error per quantity is
printed beside its tolerance. Exit code 1 if any is exceeded, or a file cannot be compared.

A file of one layer holds ``x``, ``param.*``, the mixture's addition ``y`` (without the frozen layer), ``grad_y``, the
gradients ``grad_x`` and ``grad.*`` of ``(y * grad_y).sum()``, and for sparse methods ``load_balancing_loss`` with its
own gradients ``lb_grad.*``. What neither its metadata nor its shapes say is the default of the method of that name.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import moa_peft
from moa_peft import MoAConfig
from moa_peft.architectures import ROLES
from moa_peft.auxiliary import read_losses
from moa_peft.methods import method_config

NEW_TOKENS = 12
BOUNDARY = 1e-4
"""A weight this close to its threshold may be selected either way in float32."""

EXPERT_NAMES = {f"{role}_proj": f"lora_{role}" for role in ROLES}
EXPERT_NAMES |= {"prompt": "prompt_expert", "parallel_adapter": "parallel_adapter"}

VALUES, GRADIENTS = 1e-5, 1e-4
"""In a file of one layer: how far an element may be off, as a share of the largest element of its tensor."""
LAYER_METHODS = ("molora", "hydralora", "moe_lora_topk", "adamole")
ONE_LINEAR = {"blocks": "layers", "attention": "linear", "roles": {"q": "linear"}}
PATHS: dict[str, Callable[[Any], AbstractContextManager[None]]] = {"fused": nullcontext, "plain": moa_peft.plain_path}


@dataclass(frozen=True)
class Comparison:
    """One quantity of a file: its largest absolute error, and its error over its tolerance (at most 1 passes)."""

    quantity: str
    largest_error: float
    of_tolerance: float
    note: str = ""


class Contents(dict[str, Any]):
    """The tensors or the metadata of a file; what is missing is the file's mistake."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"it holds no {key!r}; it may be damaged or of another kind.")


def load(path: Path) -> tuple[Contents, Contents]:
    """Metadata and tensors of a reference file."""
    if not path.is_file():
        raise FileNotFoundError("there is no such file.")
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return Contents(file.metadata() or {}), Contents(tensors)
    except SafetensorError as error:
        raise ValueError(f"no safetensors file, or a damaged one ({error}).") from None


def compare(path: Path) -> list[Comparison]:
    """Every quantity of one file against this implementation.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be compared, saying why.
    """
    metadata, tensors = load(path)
    if "family" in metadata:
        return compare_model(metadata, tensors)
    if metadata.get("method") in LAYER_METHODS:
        return compare_layer(metadata, tensors)
    raise ValueError(
        f"nothing to compare: its metadata name neither the family of a whole model nor the method of one layer "
        f"({', '.join(LAYER_METHODS)}); method is {metadata.get('method')!r}."
    )


def error_of(quantity: str, ours: torch.Tensor, theirs: torch.Tensor, *, atol: float, rtol: float = 0.0) -> Comparison:
    """The largest error of one tensor, and its share of ``atol + rtol * |theirs|``."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{quantity} has shape {list(theirs.shape)} in the file; here it is {list(ours.shape)}.")
    difference = (ours.detach().float() - theirs.float()).abs()
    share = difference / (atol + rtol * theirs.float().abs())
    largest = float(difference.max()) if difference.numel() else 0.0
    worst = float(share.max()) if share.numel() else 0.0
    # NaN compares false with everything; it must fail, not pass.
    worst = worst if torch.isfinite(difference).all() else float("inf")
    return Comparison(quantity, largest, worst)


def worst_of(quantity: str, rows: Sequence[Comparison]) -> Comparison:
    """Several tensors as one quantity."""
    errors, shares = zip(*((row.largest_error, row.of_tolerance) for row in rows), strict=True)
    return Comparison(quantity, max(errors), max(shares), f"{len(rows)} tensors")


# Whole models


def mixture_config(metadata: Contents) -> MoAConfig:
    """The configuration that the metadata describe; the experts stand in the order of the file."""
    rank, alpha = int(metadata.get("lora_rank", 8)), float(metadata.get("lora_alpha", 8))
    experts = []
    for name in json.loads(metadata["expert_order"]):
        if name == "prompt":
            experts.append({"type": "prompt", "length": int(metadata.get("prompt_length", 10))})
        elif name == "parallel_adapter":
            experts.append({"type": "parallel", "size": int(metadata.get("parallel_adapter_size", 16))})
        else:
            target = name.removesuffix("_proj")
            experts.append({"type": "lora", "target": target, "rank": rank, "alpha": alpha})
    router = {"type": "sigmoid", "hidden_per_expert": int(metadata.get("router_hidden_per_expert", 4))}
    if metadata["variant"] == "sparse":
        constant = metadata.get("constant_threshold", "False").lower() == "true"
        router |= {
            "threshold": "constant" if constant else "learned",
            "threshold_gradient": "none",
            "max_threshold": float(metadata.get("max_threshold", 0.5)),
        }
    router_input: Any = metadata.get("router_input", "normed")
    return MoAConfig(experts=experts, router=router, router_input=router_input, task_type="CAUSAL_LM")


def build(metadata: Contents, tensors: Contents) -> Any:
    """The adapted model, with every weight taken from the file."""
    config = AutoConfig.for_model(metadata["family"], **json.loads(metadata["config"]))
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    weights = {key.removeprefix("base."): value for key, value in tensors.items() if key.startswith("base.")}
    try:
        missing, unexpected = base.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the base weights do not fit: {error}") from None
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or not set(missing) <= tied:
        raise ValueError(f"the base weights do not fit: missing {missing}, unexpected {unexpected}.")
    base.tie_weights()
    model = get_peft_model(base, mixture_config(metadata)).eval()
    parameters = adapter_parameters(model, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"adapter.{name}"].reshape(parameter.shape))
    own = {id(p) for n, p in model.named_parameters() if ".moa." in n}
    if own != {id(p) for p in parameters.values()}:
        raise ValueError("it does not hold every tensor of the adapter.")
    return model


def adapter_parameters(model: Any, tensors: Contents) -> dict[str, torch.nn.Parameter]:
    """Names of the file's adapter tensors to our parameters."""
    layers = model.get_base_model().model.layers
    found = {}
    for key in tensors:
        if not key.startswith("adapter."):
            continue
        name = key.removeprefix("adapter.")
        _, index, part, rest = name.split(".", 3)
        layer = layers[int(index)].moa
        router = layer.moa_router["default"]
        if part == "router":
            head, rest = router.head, rest if rest[:3] in ("w1.", "w2.", "w3.") else f"linear.{rest}"
            found[name] = head.get_parameter(rest)
        elif part == "threshold":
            found[name] = router.threshold.get_parameter(rest)
        else:
            rest = f"{rest}.weight" if rest.startswith("lora_") else rest
            found[name] = layer.moa_experts["default"][EXPERT_NAMES[part]].get_parameter(rest)
    return found


def compare_model(metadata: Contents, tensors: Contents) -> list[Comparison]:
    """Logits, loss, gradients, routing and generation of a whole model."""
    model = build(metadata, tensors)
    inputs = {key: tensors[key].long() for key in ("input_ids", "attention_mask")}
    with moa_peft.record_routing(model) as record:
        output = model(**inputs, labels=tensors["labels"].long())
    output.loss.backward()
    real = inputs["attention_mask"].bool()
    results = [
        error_of("logits", output.logits[real], tensors["logits"][real], atol=5e-5),
        error_of("loss", output.loss.reshape(1), tensors["loss"].reshape(1), atol=5e-6),
        _compare_gradients(model, metadata, tensors),
        _compare_routing(record, real, tensors),
    ]
    for key in ("generated_row0", "generated_batch"):
        if key in tensors:
            results.append(_compare_generation(model, inputs, tensors, key))
    return results


def _compare_gradients(model: Any, metadata: Contents, tensors: Contents) -> Comparison:
    without = set(json.loads(metadata.get("parameters_without_gradient", "[]")))
    rows = []
    for name, parameter in adapter_parameters(model, tensors).items():
        if name in without:
            assert parameter.grad is None, f"{name} has a gradient; the reference has none"
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        theirs = tensors[f"grad.{name}"].reshape(parameter.shape)
        rows.append(error_of("gradients", parameter.grad, theirs, atol=5e-5, rtol=1e-3))
    return worst_of("gradients", rows)


def _compare_routing(record: moa_peft.RoutingRecord, real: torch.Tensor, tensors: Contents) -> Comparison:
    ours = torch.stack([routings[0].weights for routings in record.routings.values()])
    near = torch.zeros_like(ours, dtype=torch.bool)
    for index, routings in enumerate(record.routings.values()):
        if routings[0].threshold is not None:
            near[index] = (routings[0].scores - routings[0].threshold).abs() <= BOUNDARY
    compared = real[None, :, :, None] & ~near
    skipped = int((near & real[None, :, :, None]).sum())
    result = error_of("routing weights", ours[compared], tensors["routing_weights"][compared], atol=2e-5)
    return Comparison("routing weights", result.largest_error, result.of_tolerance, f"{skipped} at the threshold")


def _compare_generation(model: Any, inputs: dict[str, torch.Tensor], tensors: Contents, key: str) -> Comparison:
    rows = slice(0, 1) if key.endswith("row0") else slice(None)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    ours = model.generate(**{name: value[rows] for name, value in inputs.items()}, **settings)
    theirs = tensors[key].long()
    different = int((ours != theirs).sum()) if ours.shape == theirs.shape else theirs.numel()
    return Comparison(key, float(different), float("inf") if different else 0.0, "tokens that differ")


# Single layers


class _Block(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        nn.init.normal_(self.linear.weight, std=in_features**-0.5, generator=torch.Generator().manual_seed(0))

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.linear(hidden_states)


class OneLinear(nn.Module):
    """A model of one linear layer, for the mixture to be trained at."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = PreTrainedConfig.from_dict({"hidden_size": in_features})
        self.layers = nn.ModuleList([_Block(in_features, out_features)])

    def forward(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.layers[0](inputs_embeds, **kwargs)


def layer_config(metadata: Contents, tensors: Contents, *, with_loss: bool = False) -> MoAConfig:
    """The configuration of a mixture at one layer: its method's, with what the file says.

    Args:
        metadata: of the file; what shapes say too must agree with them.
        tensors: of the file.
        with_loss: whether the load-balancing loss belongs to it, with coefficient 1.
    """
    num_experts, in_features = tensors["param.router.weight"].shape
    read = tensors["param.lora_A.weight" if "param.lora_A.weight" in tensors else "param.lora_A.0.weight"]
    rank, out_features = read.shape[0], tensors["y"].shape[-1]
    shapes = {"num_experts": num_experts, "lora_rank": rank, "in_features": in_features, "out_features": out_features}
    for key, size in shapes.items():
        if _number(metadata, key, size) != size:
            raise ValueError(f"{key} is {metadata[key]} in its metadata, and {size} by its tensors.")
    method, alpha = metadata["method"], _number(metadata, "lora_alpha", rank)
    config = method_config(method, targets=["q"], num_experts=num_experts, rank=rank, alpha=alpha)
    router = config.router | {"bias": "param.router.bias" in tensors}
    if method == "moe_lora_topk":
        router["k"] = int(_number(metadata, "top_k", router["k"]))
    balance: dict[str, Any] = {"type": "balance", "coefficient": 1.0}
    if method == "adamole":
        router["max_threshold"] = _number(metadata, "max_threshold", 1 / num_experts)
        balance["importance"] = "above_threshold"
    losses = [balance] if with_loss else None
    return MoAConfig(experts=config.experts, router=router, scope="module", losses=losses, architecture=ONE_LINEAR)


def _number(metadata: Contents, key: str, default: float) -> float:
    try:
        return float(metadata.get(key, default))
    except ValueError:
        raise ValueError(f"{key} is {metadata[key]!r} in its metadata; it must be a number.") from None


def build_layer(config: MoAConfig, tensors: Contents) -> tuple[Any, dict[str, nn.Parameter]]:
    """The mixture at a frozen linear layer, in training mode, and its parameters by their names in the file."""
    base: Any = OneLinear(tensors["x"].shape[-1], tensors["y"].shape[-1])
    model = get_peft_model(base, config).train()
    layer = base.layers[0].moa
    router, experts = layer.moa_router["default"]["q"], list(layer.moa_experts["default"].values())
    parameters = {f"router.{key}": p for key, p in router.head.linear.named_parameters()}
    if hasattr(router, "threshold"):
        parameters |= {f"threshold.{key}": p for key, p in router.threshold.named_parameters()}
    for index, expert in enumerate(experts):
        # Experts that share their A are one module, which numbers its own.
        number = "." if len(experts) == 1 else f".{index}."
        parameters |= {key.replace(".", number, 1): p for key, p in expert.named_parameters()}
    there = {key.removeprefix("param."): list(tensors[key].shape) for key in tensors if key.startswith("param.")}
    here = {key: list(parameter.shape) for key, parameter in parameters.items()}
    if there != here:
        keys = [key for key in sorted(here | there) if here.get(key) != there.get(key)]
        wrong = ", ".join(f"{key} is {there.get(key, 'missing')}, not {here.get(key, 'there')}" for key in keys)
        raise ValueError(f"its parameters are not those of the method: {wrong}.")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[f"param.{key}"])
    return model, parameters


def compare_layer(metadata: Contents, tensors: Contents) -> list[Comparison]:
    """Values, gradients and load-balancing loss of one layer, on the fused and on the plain path."""
    rows = []
    for path, on_path in PATHS.items():
        model, parameters = build_layer(layer_config(metadata, tensors), tensors)
        x: Any = tensors["x"].clone().requires_grad_()
        with on_path(model):
            y = _addition(model, x)
        (y * tensors["grad_y"]).sum().backward()
        rows.append(_layer_error(f"y, {path}", y, tensors["y"], share=VALUES))
        rows.append(_layer_error(f"gradient of x, {path}", x.grad, tensors["grad_x"]))
        rows.append(_layer_gradients(f"gradients, {path}", "grad", parameters, tensors))
        if "load_balancing_loss" in tensors:
            model, parameters = build_layer(layer_config(metadata, tensors, with_loss=True), tensors)
            with on_path(model):
                y = _addition(model, tensors["x"])
            loss = torch.tensor(read_losses(model)["moa/balance"])
            theirs = tensors["load_balancing_loss"].reshape(())
            rows.append(_layer_error(f"balance loss, {path}", loss, theirs, share=VALUES))
            if any(key.startswith("lb_grad.") for key in tensors):
                # The loss rides on the routing weights: beside its gradient there is that of y, which is 0 here.
                (0 * y).sum().backward()
                rows.append(_layer_gradients(f"its gradients, {path}", "lb_grad", parameters, tensors))
    return rows


def _addition(model: Any, x: torch.Tensor) -> torch.Tensor:
    """What the mixture adds to the output of the frozen layer."""
    frozen = F.linear(x, model.get_base_model().layers[0].linear.weight)
    return model(inputs_embeds=x.reshape(-1, *x.shape[-2:])).reshape(frozen.shape) - frozen


def _layer_error(quantity: str, ours: torch.Tensor, theirs: torch.Tensor, *, share: float = GRADIENTS) -> Comparison:
    return error_of(quantity, ours, theirs, atol=1e-6 + share * float(theirs.abs().max()))


def _layer_gradients(quantity: str, prefix: str, parameters: dict[str, nn.Parameter], tensors: Contents) -> Comparison:
    """The parameters' gradients; one that the balance loss does not reach in the file must be 0 here."""
    rows = []
    for key, parameter in parameters.items():
        name, zero = f"{prefix}.{key}", torch.zeros_like(parameter)
        theirs = tensors[name] if prefix == "grad" or name in tensors else zero
        rows.append(_layer_error(name, zero if parameter.grad is None else parameter.grad, theirs))
    return worst_of(quantity, rows)


def main(paths: list[str]) -> int:
    """Compare every file and print one table each; 1 if a file fails."""
    if not paths:
        print(__doc__)
        return 2
    console = Console()
    failed = 0
    for path in paths:
        try:
            comparisons = compare(Path(path))
        except (FileNotFoundError, ValueError) as error:
            console.print(f"{path}: {error}", markup=False, soft_wrap=True)
            failed += 1
            continue
        table = Table("quantity", "largest error", "of tolerance", "", title=path)
        for row in comparisons:
            table.add_row(row.quantity, f"{row.largest_error:.2e}", f"{row.of_tolerance:.1%}", row.note)
        console.print(table)
        failed += any(row.of_tolerance > 1 for row in comparisons)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
