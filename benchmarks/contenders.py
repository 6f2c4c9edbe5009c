"""What is compared: the frozen base model, PEFT LoRA, and mixtures of adapters, all over the same base weights."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from benchmarks.base import Options
from benchmarks.models import make_batch, sharing_copy
from benchmarks.rows import BASE
from moa_peft import MoAConfig, record_routing
from moa_peft.architectures import ROLES
from moa_peft.layer import MoALayer
from moa_peft.methods import METHODS, method_config

NEW_WEIGHT_STD = 0.02
ROUTER_LOGIT_STD = 1.0
ADAPTER = "default"


@dataclass(frozen=True)
class Contender:
    """One method.

    Attributes:
        summary: one line for `--list`.
        config: rank and copies of each expert to a PEFT configuration; None is the base model itself.
    """

    summary: str
    config: Callable[[int, int], PeftConfig] | None = None


def lora_config(rank: int, copies: int) -> PeftConfig:
    """PEFT LoRA on q, k, v, o and down."""
    return method_config("lora", rank=rank)


def moa_config(method: str, *, prompt: bool, **knobs: Any) -> Callable[[int, int], PeftConfig]:
    """A mixture whose experts all come in the wanted number of copies."""

    def config(rank: int, copies: int) -> PeftConfig:
        one: Any = method_config(method, rank=rank, adapter_size=2 * rank, prompt=prompt, **knobs)
        return MoAConfig(experts=[expert | {"num": copies} for expert in one.experts], router=one.router)

    return config


def _preset_config(name: str, rank: int, copies: int) -> PeftConfig:
    return method_config(name)


def _top_k_config(k: int, rank: int, copies: int) -> PeftConfig:
    return method_config("moe_lora_topk", rank=rank, top_k=k)


CONTENDERS: dict[str, Contender] = {
    BASE: Contender("the frozen base model; gradients pass through its activations and reach the embeddings"),
    "lora": Contender("PEFT LoRA on q, k, v, o and down", lora_config),
    "soft": Contender("Soft MoA without the prompt expert: 6 experts", moa_config("soft_moa", prompt=False)),
    "soft_prompt": Contender("Soft MoA: 7 experts", moa_config("soft_moa", prompt=True)),
    "sparse": Contender("Sparse MoA: 6 experts", moa_config("sparse_moa", prompt=False)),
    "sparse_prompt": Contender("Sparse MoA with the prompt expert: 7 experts", moa_config("sparse_moa", prompt=True)),
    "sparse_cut": Contender(
        "Sparse MoA without a gradient through the threshold: 6 experts",
        moa_config("sparse_moa", prompt=False, threshold_gradient="none"),
    ),
    "soft_24": Contender("soft, four of each of its experts", moa_config("soft_moa", prompt=False)),
    "sparse_24": Contender("sparse, four of each of its experts", moa_config("sparse_moa", prompt=False)),
    "sparse_cut_24": Contender(
        "sparse_cut, four of each of its experts",
        moa_config("sparse_moa", prompt=False, threshold_gradient="none"),
    ),
}
for _k in (2, 4):
    CONTENDERS[f"top_{_k}_of_8"] = Contender(
        f"eight LoRA experts on each of q, k, v, o and down, {_k} per token", partial(_top_k_config, _k)
    )
CONTENDERS["lora_64"] = Contender(
    "PEFT LoRA of rank 64 on q, k, v, o and down", lambda rank, copies: method_config("lora", rank=64)
)
CONTENDERS["lora_64_all"] = Contender(
    "PEFT LoRA of rank 64 on all seven linear layers of a block",
    lambda rank, copies: method_config("lora", rank=64, targets=ROLES),
)
PRESETS = tuple(name for name in METHODS if name != "lora")
for _name in PRESETS:
    CONTENDERS[_name] = Contender(f"the preset {_name} with its defaults", partial(_preset_config, _name))
STANDARD = tuple(name for name in CONTENDERS if name not in PRESETS)
TIMED = (BASE, "lora", "soft", "soft_prompt", "sparse", "sparse_prompt")


def rank_of(name: str, options: Options) -> int | None:
    """The LoRA rank that a contender has in a run; None where it has no LoRA."""
    make = CONTENDERS[name].config
    if make is None:
        return None
    config: Any = make(options.rank, 1)
    if not isinstance(config, MoAConfig):
        return config.r
    ranks = {entry["rank"] for entry in config.experts or [] if "rank" in entry}
    assert len(ranks) <= 1, f"{name} has experts of several ranks"
    return ranks.pop() if ranks else None


def settings_of(name: str, options: Options, **more: Any) -> dict[str, Any]:
    """What the numbers of a contender depend on besides the model.

    Args:
        name: a key of `CONTENDERS`.
        options: of the run, or of the contender's place in it.
        **more: what the benchmark adds.
    """
    rank = rank_of(name, options)
    return options.settings() | ({} if rank is None else {"rank": rank}) | more


def about(benchmark: str, names: Iterable[str], options: Options, **more: Any) -> dict[str, Any]:
    """What the rows of a benchmark say of themselves, as arguments of `rows_of`.

    Args:
        benchmark: name in the registry.
        names: its contenders.
        options: of the run.
        **more: settings that the benchmark adds.
    """
    settings = {name: settings_of(name, options, **more) for name in names}
    return {"benchmark": benchmark, "model": options.model_name, "settings": settings}


def build(name: str, base: nn.Module, options: Options, *, train: bool) -> Any:
    """One contender over the weights of `base`.

    Args:
        name: a key of `CONTENDERS`.
        base: from `base_model`.
        options: rank, active fraction and seed.
        train: gradients will be taken: training mode, and embeddings whose output requires gradients. So every
            contender, the base model included, runs the backward pass through all of every block.
    """
    model = sharing_copy(base)
    if train:
        model.enable_input_require_grads()
    make = CONTENDERS[name].config
    if make is not None:
        torch.manual_seed(options.seed)
        model = get_peft_model(model, make(options.rank, 4 if name.endswith("_24") else 1))
        fill_new_weights(model, seed=options.seed)
        if name.startswith("sparse"):
            calibrate(model, options)
    return model.train(train)


def build_all(names: Iterable[str], base: nn.Module, options: Options, *, train: bool) -> dict[str, Any]:
    """Several contenders over the same weights, by name."""
    return {name: build(name, base, options, train=train) for name in names}


def fill_new_weights(model: nn.Module, *, seed: int) -> None:
    """Give adapters the weights of one that has been trained a little.

    What starts at zero becomes small, so that no product is with zeros; the last layer of each router is scaled so
    that its logits differ between tokens by about one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            head = re.search(rf"\.moa_router\.{ADAPTER}\.(\w+\.)?head\.(w2|linear)\.weight$", name)
            if head or not parameter.any():
                std = NEW_WEIGHT_STD
                if head:
                    # A linear head reads a hidden state, whose elements are about 1; w2 reads small numbers.
                    std = ROUTER_LOGIT_STD / (1.0 if head[2] == "w2" else math.sqrt(parameter.shape[1]))
                noise = torch.randn(parameter.shape, generator=generator) * std
                parameter.copy_(noise.to(parameter))


def calibrate(model: nn.Module, options: Options) -> None:
    """Move the routers' biases so that each expert is kept for the wanted share of the tokens.

    An expert is kept where its score reaches the threshold, that is where the difference of their logits is not
    negative, and a bias shifts that difference. The second pass corrects for the changed input of later blocks.
    """
    input_ids = make_batch(options)["input_ids"]
    layers = {name.removesuffix(".moa"): part for name, part in model.named_modules() if isinstance(part, MoALayer)}
    training = model.training
    model.eval()
    for _ in range(2):
        with torch.no_grad(), record_routing(model) as record:
            model(input_ids=input_ids, use_cache=False)
        for name, layer in layers.items():
            routing = record.routings[name][-1]
            assert routing.threshold is not None
            margin_NE = (torch.logit(routing.scores) - torch.logit(routing.threshold)).flatten(0, -2)
            bias: Any = layer.moa_router.get_submodule(f"{ADAPTER}.head.w2").bias
            with torch.no_grad():
                bias -= torch.quantile(margin_NE, 1.0 - options.active_fraction, dim=0) - 1e-4
    model.train(training)


def kept_fraction(model: nn.Module, options: Options) -> float:
    """Share of (token, expert) pairs that a sparse mixture keeps on the benchmark's batch."""
    with torch.no_grad(), record_routing(model) as record:
        model(input_ids=make_batch(options)["input_ids"], use_cache=False)
    kept = [(routings[-1].weights != 0).float().mean() for routings in record.routings.values()]
    return float(torch.stack(kept).mean())
