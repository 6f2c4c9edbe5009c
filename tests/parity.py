"""Compare Soft and Sparse MoA with outputs of the released reference implementation.

    python -m tests.parity FILE...

Each FILE is a safetensors file whose metadata describe the model, the mixture and the tensors in it. The model is
built from the metadata, its weights are taken from the file, and the largest error per quantity is printed beside its
tolerance. Exit code 1 if any is exceeded.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import moa_peft
from moa_peft import MoAConfig

NEW_TOKENS = 12
BOUNDARY = 1e-4
"""A weight this close to its threshold may be selected either way in float32."""

EXPERT_NAMES = {
    "q_proj": "lora_q",
    "k_proj": "lora_k",
    "v_proj": "lora_v",
    "o_proj": "lora_o",
    "up_proj": "lora_up",
    "gate_proj": "lora_gate",
    "down_proj": "lora_down",
    "prompt": "prompt_expert",
    "parallel_adapter": "parallel_adapter",
}


@dataclass(frozen=True)
class Comparison:
    """One quantity of a file: its largest absolute error, and its error over its tolerance (at most 1 passes)."""

    quantity: str
    largest_error: float
    of_tolerance: float
    note: str = ""


def load(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a reference file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    with safe_open(str(path), "pt") as file:
        if "family" not in (file.metadata() or {}):
            raise ValueError(f"{path}: no whole model (its metadata name no family); nothing to compare here.")
        return dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def mixture_config(metadata: dict[str, str]) -> MoAConfig:
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
    router_input = metadata.get("router_input", "normed")
    return MoAConfig(experts=experts, router=router, router_input=router_input, task_type="CAUSAL_LM")


def build(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> PeftModel:
    """The adapted model, with every weight taken from the file."""
    config = AutoConfig.for_model(metadata["family"], **json.loads(metadata["config"]))
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    weights = {key.removeprefix("base."): value for key, value in tensors.items() if key.startswith("base.")}
    missing, unexpected = base.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert set(missing) <= tied and not unexpected, f"base weights do not fit: {missing} {unexpected}"
    base.tie_weights()
    model = get_peft_model(base, mixture_config(metadata)).eval()
    parameters = adapter_parameters(model, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"adapter.{name}"].reshape(parameter.shape))
    own = {id(p) for n, p in model.named_parameters() if ".moa." in n}
    assert own == {id(p) for p in parameters.values()}, "the file does not hold every adapter tensor"
    return model


def adapter_parameters(model: PeftModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
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


def _error(quantity: str, ours: torch.Tensor, theirs: torch.Tensor, *, atol: float, rtol: float = 0.0) -> Comparison:
    difference = (ours.detach().float() - theirs.float()).abs()
    share = difference / (atol + rtol * theirs.float().abs())
    largest = float(difference.max()) if difference.numel() else 0.0
    worst = float(share.max()) if share.numel() else 0.0
    # NaN compares false with everything; it must fail, not pass.
    worst = worst if torch.isfinite(difference).all() else float("inf")
    return Comparison(quantity, largest, worst)


def compare(path: Path) -> list[Comparison]:
    """Every quantity of one file against this implementation."""
    metadata, tensors = load(path)
    model = build(metadata, tensors)
    inputs = {key: tensors[key].long() for key in ("input_ids", "attention_mask")}
    with moa_peft.record_routing(model) as record:
        output = model(**inputs, labels=tensors["labels"].long())
    output.loss.backward()
    real = inputs["attention_mask"].bool()
    results = [
        _error("logits", output.logits[real], tensors["logits"][real], atol=5e-5),
        _error("loss", output.loss.reshape(1), tensors["loss"].reshape(1), atol=5e-6),
        _compare_gradients(model, metadata, tensors),
        _compare_routing(record, real, tensors),
    ]
    for key in ("generated_row0", "generated_batch"):
        if key in tensors:
            results.append(_compare_generation(model, inputs, tensors, key))
    return results


def _compare_gradients(model: PeftModel, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> Comparison:
    without = set(json.loads(metadata.get("parameters_without_gradient", "[]")))
    worst = Comparison("gradients", 0.0, 0.0)
    parameters = adapter_parameters(model, tensors)
    for name, parameter in parameters.items():
        if name in without:
            assert parameter.grad is None, f"{name} has a gradient; the reference has none"
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        theirs = tensors[f"grad.{name}"].reshape(parameter.shape)
        one = _error("gradients", parameter.grad, theirs, atol=5e-5, rtol=1e-3)
        if one.of_tolerance > worst.of_tolerance:
            worst = one
    return Comparison("gradients", worst.largest_error, worst.of_tolerance, f"{len(parameters)} tensors")


def _compare_routing(
    record: moa_peft.RoutingRecord, real: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> Comparison:
    ours = torch.stack([routings[0].weights for routings in record.routings.values()])
    near = torch.zeros_like(ours, dtype=torch.bool)
    for index, routings in enumerate(record.routings.values()):
        if routings[0].threshold is not None:
            near[index] = (routings[0].scores - routings[0].threshold).abs() <= BOUNDARY
    compared = real[None, :, :, None] & ~near
    skipped = int((near & real[None, :, :, None]).sum())
    result = _error("routing weights", ours[compared], tensors["routing_weights"][compared], atol=2e-5)
    return Comparison("routing weights", result.largest_error, result.of_tolerance, f"{skipped} at the threshold")


def _compare_generation(
    model: PeftModel, inputs: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], key: str
) -> Comparison:
    rows = slice(0, 1) if key.endswith("row0") else slice(None)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    ours = model.generate(**{name: value[rows] for name, value in inputs.items()}, **settings)
    theirs = tensors[key].long()
    different = int((ours != theirs).sum()) if ours.shape == theirs.shape else theirs.numel()
    return Comparison(key, float(different), float("inf") if different else 0.0, "tokens that differ")


def main(paths: list[str]) -> int:
    """Compare every file and print one table each; the number of files that failed."""
    if not paths:
        print(__doc__)
        return 2
    console = Console()
    failed = 0
    for path in paths:
        try:
            comparisons = compare(Path(path))
        except (FileNotFoundError, ValueError) as error:
            console.print(str(error), markup=False)
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
