"""Named methods: complete configurations with their paper's defaults, and the knobs to change them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from peft import LoraConfig, PeftConfig

from moa_peft.config import MoAConfig
from moa_peft.errors import UserError

PAPER = "arXiv 2506.05928"
MOA_TARGETS = ("q", "k", "v", "o", "down")


@dataclass(frozen=True)
class Method:
    """One row of ``moa methods``.

    Attributes:
        name: what recipes call it.
        build: function of its knobs that returns a configuration.
        formula: what it adds.
        source: paper.
        scope: what owns one router.
    """

    name: str
    build: Callable[..., PeftConfig]
    formula: str
    source: str
    scope: str

    @property
    def knobs(self) -> dict[str, Any]:
        """Names and defaults of its own knobs."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


METHODS: dict[str, Method] = {}


def _method(formula: str, source: str, scope: str) -> Callable[[Callable[..., PeftConfig]], Callable[..., PeftConfig]]:
    def enter(build: Callable[..., PeftConfig]) -> Callable[..., PeftConfig]:
        METHODS[build.__name__] = Method(build.__name__, build, formula, source, scope)
        return build

    return enter


def method_config(name: str, **knobs: Any) -> Any:
    """The configuration of the method `name`.

    Args:
        name: a key of `METHODS`.
        **knobs: the method's knobs, and any field of the configuration class it returns (`task_type`, ...).

    Raises:
        UserError: for an unknown method or knob.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"Unknown method {name!r}.{hint} Known: {', '.join(METHODS)}.")
    method = METHODS[name]
    own = {key: value for key, value in knobs.items() if key in method.knobs}
    rest = {key: value for key, value in knobs.items() if key not in method.knobs}
    config_fields = _fields_of(method)
    for key in rest:
        if key not in config_fields:
            near = get_close_matches(key, [*method.knobs, *config_fields], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"Method {name!r} has no knob {key!r}.{hint} Knobs: {', '.join(method.knobs)}.")
    return method.build(**own, **rest)


def _fields_of(method: Method) -> set[str]:
    config_class = inspect.signature(method.build).return_annotation
    set_by_knobs = {"experts", "router", "target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora"}
    return {f.name for f in fields(config_class)} - set_by_knobs - {"peft_type"}


def moa_experts(
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: tuple[str, ...] | list[str] = MOA_TARGETS,
    adapter_size: int = 16,
    prompt: bool = True,
    prompt_length: int = 10,
    layers: list[int] | str | None = None,
) -> list[dict[str, Any]]:
    """The experts of MoA in their canonical order (METHODS 1.1): LoRA q, k, v; prompt; LoRA o, (up, gate,) down;
    parallel.

    Args:
        rank: LoRA rank.
        alpha: LoRA alpha; None is the rank.
        dropout: LoRA dropout.
        rslora: rank-stabilised scale.
        targets: roles or modules with a LoRA expert.
        adapter_size: inner width of the parallel adapter; 0 leaves it out.
        prompt: whether there is a prompt expert.
        prompt_length: number of prompt tokens.
        layers: blocks that get the experts; None is all.
    """
    before = [t for t in ("q", "k", "v") if t in targets]
    after = [t for t in ("o", "up", "gate", "down") if t in targets]
    others = [t for t in targets if t not in before + after]
    common: dict[str, Any] = {"layers": layers, "optional": True}
    lora = {"type": "lora", "rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora} | common
    experts: list[dict[str, Any]] = [lora | {"target": target} for target in before]
    if prompt:
        experts.append({"type": "prompt", "length": prompt_length} | common)
    experts += [lora | {"target": target} for target in after]
    experts += [lora | {"target": target, "optional": False} for target in others]
    if adapter_size:
        experts.append({"type": "parallel", "size": adapter_size} | common)
    return experts


@_method("out = base + sum_i sigmoid(r(z))_i E_i(x)", PAPER, "block")
def soft_moa(
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: tuple[str, ...] | list[str] = MOA_TARGETS,
    adapter_size: int = 16,
    prompt: bool = True,
    prompt_length: int = 10,
    layers: list[int] | str | None = None,
    hidden_per_expert: int = 4,
    **config: Any,
) -> MoAConfig:
    """Soft MoA: every expert takes part in every token, with an independent sigmoid weight.

    `hidden_per_expert` is the inner width of the router per expert (0: a linear router); the other knobs are those of
    `moa_experts`.
    """
    return MoAConfig(
        experts=moa_experts(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rslora=rslora,
            targets=targets,
            adapter_size=adapter_size,
            prompt=prompt,
            prompt_length=prompt_length,
            layers=layers,
        ),
        router={"type": "sigmoid", "hidden_per_expert": hidden_per_expert},
        **config,
    )


@_method("out = base + sum_i w_i 1[w_i >= tau(z)] E_i(x),  w = sigmoid(r(z))", PAPER, "block")
def sparse_moa(
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: tuple[str, ...] | list[str] = MOA_TARGETS,
    adapter_size: int = 16,
    prompt: bool = False,
    prompt_length: int = 10,
    layers: list[int] | str | None = None,
    hidden_per_expert: int = 4,
    threshold: str = "learned",
    max_threshold: float = 0.5,
    threshold_gradient: str = "straight_through",
    threshold_temperature: float = 0.1,
    **config: Any,
) -> MoAConfig:
    """Sparse MoA: experts whose weight stays below a learned (or constant) threshold are left out per token.

    The threshold's knobs are those of `moa_peft.routers.sigmoid`; the prompt expert is off, as in the paper.
    """
    return MoAConfig(
        experts=moa_experts(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rslora=rslora,
            targets=targets,
            adapter_size=adapter_size,
            prompt=prompt,
            prompt_length=prompt_length,
            layers=layers,
        ),
        router={
            "type": "sigmoid",
            "hidden_per_expert": hidden_per_expert,
            "threshold": threshold,
            "max_threshold": max_threshold,
            "threshold_gradient": threshold_gradient,
            "threshold_temperature": threshold_temperature,
        },
        **config,
    )


@_method("out = base + alpha / r * B A x", "arXiv 2106.09685", "-")
def lora(
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: tuple[str, ...] | list[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
    **config: Any,
) -> LoraConfig:
    """Plain LoRA, the baseline: this returns PEFT's own `LoraConfig`, nothing of this package acts.

    `targets` are module names, since PEFT knows no roles.
    """
    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=list(targets),
        **config,
    )
