"""A second implementation of Soft and Sparse MoA in plain torch, to compare the package with.

    python -m tests.independent_reference OUT_DIR

writes the files ``independent_*.safetensors``, of which copies lie in ``tests/parity_data``. It follows the equations
of the method in the order in which they are written, whole models of the Llama and Qwen3 families
included, and imports neither the package nor transformers, so that no mistake can be shared. The cases are settings
that the outputs of the released implementation do not cover. Everything is deterministic: one seed, float32, CPU.

Shapes: B batch, T tokens, D model, E experts, H heads, K head width, P prompt.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD_WIDTH = 80, 48, 100, 3, 6, 2, 12
ROWS, TOKENS, PROMPT_TOKENS, NEW_TOKENS = 3, 14, 6, 12
PADDING = (0, 4, 2)
"""Padded positions at the left of each row."""
EPSILON, ROPE_BASE = 1e-6, 10000.0

LINEARS = {
    "q_proj": (HEADS * HEAD_WIDTH, WIDTH),
    "k_proj": (KV_HEADS * HEAD_WIDTH, WIDTH),
    "v_proj": (KV_HEADS * HEAD_WIDTH, WIDTH),
    "o_proj": (WIDTH, HEADS * HEAD_WIDTH),
    "gate_proj": (INNER, WIDTH),
    "up_proj": (INNER, WIDTH),
    "down_proj": (WIDTH, INNER),
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PAPER_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "prompt", "parallel_adapter")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One file.

    Attributes:
        name: of the file, after ``independent_``.
        family: llama or qwen3.
        variant: soft or sparse.
        experts: order of the routing weights.
        rank: of the LoRA experts.
        alpha: of the LoRA experts.
        size: of the parallel adapter.
        length: of the prompt.
        hidden_per_expert: inner width of the router per expert; 0 is a linear router.
        router_input: normed or residual.
        constant: whether the threshold is `max_threshold` itself.
        max_threshold: upper bound of the threshold.
        tied: whether the output layer is the embedding.
    """

    name: str
    family: str
    variant: str
    experts: tuple[str, ...]
    rank: int
    alpha: int
    size: int
    length: int
    hidden_per_expert: int
    router_input: str
    constant: bool = False
    max_threshold: float = 0.5
    tied: bool = False

    @property
    def learns_threshold(self) -> bool:
        """Whether there are tensors for the threshold."""
        return self.variant == "sparse" and not self.constant


# fmt: off
CASES = (
    Case(
        name="llama_linear_residual", family="llama", variant="soft", experts=PAPER_ORDER,
        rank=4, alpha=16, size=8, length=6, hidden_per_expert=0, router_input="residual",
    ),
    Case(
        name="qwen3_constant_residual", family="qwen3", variant="sparse",
        experts=("q_proj", "v_proj", "up_proj", "gate_proj", "down_proj", "parallel_adapter"),
        rank=3, alpha=7, size=20, length=6, hidden_per_expert=0, router_input="residual", constant=True,
    ),
    Case(
        name="qwen3_sparse_prompt_tied", family="qwen3", variant="sparse", experts=PAPER_ORDER, tied=True,
        rank=5, alpha=10, size=12, length=7, hidden_per_expert=2, router_input="normed", max_threshold=0.8,
    ),
    Case(
        name="llama_rank1", family="llama", variant="sparse",
        experts=("parallel_adapter", "o_proj", "prompt", "k_proj"),
        rank=1, alpha=1, size=1, length=1, hidden_per_expert=7, router_input="normed", constant=True,
        max_threshold=0.45,
    ),
)
# fmt: on


def linear_name(name: str) -> str:
    """Where a block keeps one of its linear layers."""
    return f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}.weight"


def draw_weights(case: Case) -> tuple[Tensors, Tensors]:
    """Random weights of the base model and of the adapter, none of them trivial.

    The order of the draws is part of the files.
    """

    def normal(*shape: int, std: float = 0.1) -> torch.Tensor:
        return torch.randn(*shape) * std

    base = {"model.embed_tokens.weight": normal(VOCABULARY, WIDTH, std=1.0), "model.norm.weight": 1 + normal(WIDTH)}
    adapter: Tensors = {}
    if not case.tied:
        base["lm_head.weight"] = normal(VOCABULARY, WIDTH, std=0.4)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        for name, shape in LINEARS.items():
            base[block + linear_name(name)] = normal(*shape, std=0.2)
        base[block + "input_layernorm.weight"] = 1 + normal(WIDTH)
        base[block + "post_attention_layernorm.weight"] = 1 + normal(WIDTH)
        if case.family == "qwen3":
            base[block + "self_attn.q_norm.weight"] = 1 + normal(HEAD_WIDTH)
            base[block + "self_attn.k_norm.weight"] = 1 + normal(HEAD_WIDTH)
        for name in case.experts:
            part = f"layers.{layer}.{name}."
            if name == "prompt":
                adapter[part + "embedding"] = normal(case.length, WIDTH, std=1.0)
                adapter[part + "gate"] = normal(1, HEADS, 1, 1, std=0.7)
            elif name == "parallel_adapter":
                adapter[part + "down.weight"] = normal(case.size, WIDTH, std=0.2)
                adapter[part + "down.bias"] = normal(case.size)
                adapter[part + "up.weight"] = normal(WIDTH, case.size, std=0.2)
                adapter[part + "up.bias"] = normal(WIDTH)
            else:
                adapter[part + "lora_A"] = normal(case.rank, LINEARS[name][1], std=0.2)
                adapter[part + "lora_B"] = normal(LINEARS[name][0], case.rank, std=0.2)
        num_experts, inner = len(case.experts), case.hidden_per_expert * len(case.experts)
        router = f"layers.{layer}.router."
        if case.hidden_per_expert == 0:
            adapter[router + "weight"] = normal(num_experts, WIDTH, std=0.2)
            adapter[router + "bias"] = normal(num_experts)
        else:
            for name, (rows, columns, std) in {
                "w1": (inner, WIDTH, 0.3),
                "w3": (inner, WIDTH, 0.3),
                "w2": (num_experts, inner, 0.4),
            }.items():
                adapter[f"{router}{name}.weight"] = normal(rows, columns, std=std)
                adapter[f"{router}{name}.bias"] = normal(rows)
        if case.learns_threshold:
            adapter[f"layers.{layer}.threshold.weight"] = normal(1, WIDTH, std=0.3)
            adapter[f"layers.{layer}.threshold.bias"] = normal(1)
    return base, adapter


def affine(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    """``W x + b``."""
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x / rms(x) * weight``."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight


def rotate(x_BHTK: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding; the two halves of a head form the pairs."""
    half = HEAD_WIDTH // 2
    frequencies = 1 / (ROPE_BASE ** (torch.arange(0, HEAD_WIDTH, 2).float() / HEAD_WIDTH))
    angles = (positions_BT[:, :, None].float() * frequencies)[:, None]
    first, second = x_BHTK[..., :half], x_BHTK[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


class Model:
    """A decoder with a mixture of adapters.

    Args:
        case: what it is made of.
        base: weights of the base model.
        adapter: weights of the adapter.
    """

    def __init__(self, case: Case, base: Tensors, adapter: Tensors) -> None:
        self.case, self.base, self.adapter = case, base, adapter

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[B, T, V]`` and routing weights ``[layers, B, T, E]``."""
        tokens = ids.shape[1]
        allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril() & mask[:, None, None].bool()
        # A finite number: rows of padding, which see nothing, must not become NaN.
        bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        hidden = self.base["model.embed_tokens.weight"][ids]
        routings = []
        for layer in range(LAYERS):
            hidden, weights = self.block(layer, hidden, bias, positions)
            routings.append(weights)
        hidden = rms_norm(hidden, self.base["model.norm.weight"])
        output = self.base["model.embed_tokens.weight" if self.case.tied else "lm_head.weight"]
        return hidden @ output.T, torch.stack(routings)

    def block(
        self, layer: int, hidden: torch.Tensor, bias: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One decoder block: its output and its routing weights ``w [B, T, E]``."""
        name = f"model.layers.{layer}."
        normed = rms_norm(hidden, self.base[name + "input_layernorm.weight"])
        w = self.route(layer, normed if self.case.router_input == "normed" else hidden)
        heads = self.attend(layer, normed, w, bias, positions)
        hidden = hidden + self.linear(layer, "o_proj", heads, w)
        normed = rms_norm(hidden, self.base[name + "post_attention_layernorm.weight"])
        inner = F.silu(self.linear(layer, "gate_proj", normed, w)) * self.linear(layer, "up_proj", normed, w)
        output = self.linear(layer, "down_proj", inner, w)
        if "parallel_adapter" in self.case.experts:
            part = f"layers.{layer}.parallel_adapter"
            adapted = affine(self.adapter, f"{part}.up", F.silu(affine(self.adapter, f"{part}.down", normed)))
            output = output + self.weight_of("parallel_adapter", w) * adapted
        return hidden + output, w

    def route(self, layer: int, z: torch.Tensor) -> torch.Tensor:
        """``w = sigmoid(router(z))``; Sparse keeps what reaches ``tau = max_threshold * sigmoid(v z + c)``."""
        router = f"layers.{layer}.router"
        if self.case.hidden_per_expert == 0:
            logits = affine(self.adapter, router, z)
        else:
            gate = F.silu(affine(self.adapter, f"{router}.w1", z))
            logits = affine(self.adapter, f"{router}.w2", gate * affine(self.adapter, f"{router}.w3", z))
        w = torch.sigmoid(logits)
        if self.case.variant == "soft":
            return w
        threshold = torch.full_like(w[..., :1], self.case.max_threshold)
        if self.case.learns_threshold:
            threshold = threshold * torch.sigmoid(affine(self.adapter, f"layers.{layer}.threshold", z))
        return torch.where(w >= threshold, w, torch.zeros_like(w))

    def weight_of(self, expert: str, w: torch.Tensor) -> torch.Tensor:
        """The column ``[B, T, 1]`` of one expert."""
        column = self.case.experts.index(expert)
        return w[..., column : column + 1]

    def linear(self, layer: int, name: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """``W x + w * (alpha / r) * B A x``, where the layer has an expert."""
        y = x @ self.base[f"model.layers.{layer}.{linear_name(name)}"].T
        if name not in self.case.experts:
            return y
        a, b = (self.adapter[f"layers.{layer}.{name}.lora_{part}"] for part in "AB")
        return y + self.weight_of(name, w) * (self.case.alpha / self.case.rank) * (x @ a.T @ b.T)

    def attend(
        self, layer: int, normed: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Causal attention, and attention to the learned prompt behind its gate; ``[B, T, H * K]``."""
        batch, tokens = normed.shape[:2]

        def heads(x: torch.Tensor, number: int) -> torch.Tensor:
            return x.view(*x.shape[:-1], number, HEAD_WIDTH).transpose(-2, -3)

        query = self.head_norm(layer, "q", heads(self.linear(layer, "q_proj", normed, w), HEADS))
        key = self.head_norm(layer, "k", heads(self.linear(layer, "k_proj", normed, w), KV_HEADS))
        value = heads(self.linear(layer, "v_proj", normed, w), KV_HEADS)
        query, key = rotate(query, positions), rotate(key, positions)
        output = _attention(query, key, value, bias)
        if "prompt" in self.case.experts:
            prompt = self.adapter[f"layers.{layer}.prompt.embedding"]
            # The frozen projections: no LoRA, no rotation.
            plain = f"model.layers.{layer}.self_attn."
            key = self.head_norm(layer, "k", heads(prompt @ self.base[plain + "k_proj.weight"].T, KV_HEADS))
            value = heads(prompt @ self.base[plain + "v_proj.weight"].T, KV_HEADS)
            gate = self.adapter[f"layers.{layer}.prompt.gate"]
            prompted = _attention(query, key, value, torch.zeros(()), gate)
            output = output + self.weight_of("prompt", w)[:, None] * prompted
        return output.transpose(1, 2).reshape(batch, tokens, HEADS * HEAD_WIDTH)

    def head_norm(self, layer: int, which: str, x: torch.Tensor) -> torch.Tensor:
        """Qwen3 normalises every query and key."""
        if self.case.family != "qwen3":
            return x
        return rms_norm(x, self.base[f"model.layers.{layer}.self_attn.{which}_norm.weight"])


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, gate: torch.Tensor | float = 1.0
) -> torch.Tensor:
    repeats = HEADS // KV_HEADS
    key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.transpose(-1, -2) / math.sqrt(HEAD_WIDTH) + bias
    return (scores.softmax(-1) * gate) @ value


def compute(case: Case) -> tuple[dict[str, str], Tensors]:
    """Metadata and tensors of one file."""
    torch.manual_seed(0)
    base, adapter = draw_weights(case)
    for tensor in adapter.values():
        tensor.requires_grad_(True)
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS))
    mask = torch.stack([(torch.arange(TOKENS) >= padded).long() for padded in PADDING])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT_TOKENS] = -100
    model = Model(case, base, adapter)
    # As in the released files, positions of the forward pass count padding; those of generation do not.
    logits, routing = model(ids, mask, torch.arange(TOKENS).expand(ROWS, TOKENS))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    gradients = dict(zip(adapter, torch.autograd.grad(loss, list(adapter.values()), allow_unused=True), strict=True))
    generated = generate(model, ids, mask)
    tensors = {f"base.{name}": tensor for name, tensor in base.items()}
    tensors |= {f"adapter.{name}": tensor for name, tensor in adapter.items()}
    tensors |= {f"grad.{name}": tensor for name, tensor in gradients.items() if tensor is not None}
    tensors |= {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits": logits}
    tensors |= {"loss": loss.reshape(1), "routing_weights": routing}
    tensors |= {"generated_batch": generated, "generated_row0": generated[:1]}
    without = [name for name, gradient in gradients.items() if gradient is None]
    return _metadata(case, without), {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def generate(model: Model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Greedy continuation, the whole text computed anew for every token."""
    for _ in range(NEW_TOKENS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits, _ = model(ids, mask, positions)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


def _metadata(case: Case, without_gradient: list[str]) -> dict[str, str]:
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_WIDTH,
        "max_position_embeddings": 128,
        "tie_word_embeddings": case.tied,
        "rms_norm_eps": EPSILON,
        "rope_theta": ROPE_BASE,
    }
    return {
        "family": case.family,
        "variant": case.variant,
        "config": json.dumps(config),
        "expert_order": json.dumps(case.experts),
        "prompt": str("prompt" in case.experts),
        "prompt_length": str(case.length),
        "lora_rank": str(case.rank),
        "lora_alpha": str(case.alpha),
        "parallel_adapter_size": str(case.size),
        "router_hidden_per_expert": str(case.hidden_per_expert),
        "router_input": case.router_input,
        "constant_threshold": str(case.constant),
        "max_threshold": str(case.max_threshold),
        "parameters_without_gradient": json.dumps(without_gradient),
    }


def main(arguments: list[str]) -> int:
    """Write every case into a folder."""
    if len(arguments) != 1:
        print(__doc__)
        return 2
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        metadata, tensors = compute(case)
        file = folder / f"independent_{case.name}.safetensors"
        save_file(tensors, file, metadata)
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
