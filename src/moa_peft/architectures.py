"""Model families as data: what each calls its blocks, linear layers, MLP and norms.

A family is found by the ``model_type`` of the decoder stack, so the text tower of an image-text model is found too.
A family that is not listed can be described in the configuration, ``MoAConfig(architecture={...})``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moa_peft.errors import UserError
from moa_peft.fields import build_options, check_choice

ATTENTION_INPUT = "attention input"
"""Name of what the q, k and v projections read (and the router, where it reads the norm's output)."""

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(kw_only=True)
class Architecture:
    """What one model family calls its parts; all names are relative to a block unless said otherwise.

    Attributes:
        blocks: the list of blocks: its name in the decoder stack, or its full name from the model's root.
        attention: attention module.
        roles: role (``q k v o gate up down``) to linear layer; roles that share one linear (fused projections) name
            the same one. Roles that a family lacks are left out.
        mlp: module beside which the parallel adapter sits; or the two modules ``[first, last]`` whose input and output
            it uses, where a block has no MLP module.
        glu: activation of an MLP that computes ``down(act(gate(x)) * up(x))`` and nothing else; None for other MLPs.
        norm: norm whose output attention reads; None where attention reads the residual stream itself (post-norm).
        key_value_layout: how prompt keys and values are cut from the projections: ``separate`` k and v layers, fused
            ``concatenated`` (q, k, v), or fused ``interleaved`` per head.
        key_norm: norm of keys inside the attention module that works per head, used if the model has it.
        no_prompt: why the prompt expert cannot work here; None where it can.
        no_sequence: why sequence granularity cannot work here; None where it can.
    """

    blocks: str
    attention: str
    roles: dict[str, str] = field(default_factory=dict)
    mlp: str | list[str] | None = None
    glu: str | None = None
    norm: str | None = None
    key_value_layout: Literal["separate", "concatenated", "interleaved"] = "separate"
    key_norm: str | None = None
    no_prompt: str | None = None
    no_sequence: str | None = None

    def __post_init__(self) -> None:
        for role in self.roles:
            check_choice("architecture.roles", role, ROLES)
        check_choice(
            "architecture.key_value_layout", self.key_value_layout, ("separate", "concatenated", "interleaved")
        )
        if isinstance(self.mlp, list) and len(self.mlp) != 2:
            raise UserError(f"architecture.mlp is {self.mlp!r}; it must be one module name or [first, last].")

    def input_of(self, path: str) -> str:
        """What the module `path` reads: modules with the same answer may read the same tensor."""
        roles = self.roles_of(path)
        if any(role in ("q", "k", "v") for role in roles):
            return ATTENTION_INPUT
        first = self.mlp[0] if isinstance(self.mlp, list) else self.mlp
        if path == first or any(role in ("gate", "up") for role in roles):
            return "mlp input"
        return path

    def roles_of(self, path: str) -> list[str]:
        """The roles that the linear layer `path` plays, in the canonical order."""
        return [role for role in ROLES if self.roles.get(role) == path]


def _llama_like(**changes: Any) -> Architecture:
    attention = {role: f"self_attn.{role}_proj" for role in "qkvo"}
    mlp = {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}
    values: dict[str, Any] = {
        "blocks": "layers",
        "attention": "self_attn",
        "roles": attention | mlp,
        "mlp": "mlp",
        "glu": "mlp.act_fn",
        "norm": "input_layernorm",
        "key_norm": "k_norm",
    }
    return Architecture(**(values | changes))


_FULL_WIDTH_KEY_NORM = "its key norm works over the full width of all heads"
_NO_INTERFACE = "its attention does not go through transformers' attention interface"
_SPARSE_MLP = {role: f"self_attn.{role}_proj" for role in "qkvo"}

ARCHITECTURES: Mapping[str, Architecture] = {
    **{
        name: _llama_like()
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "smollm3")
    },
    "olmo2": _llama_like(norm=None, key_norm=None, no_prompt=_FULL_WIDTH_KEY_NORM),
    # Expert layers are fused three-dimensional parameters; the roles of the MLP exist in dense blocks only.
    "qwen3_moe": _llama_like(),
    "mixtral": _llama_like(roles=_SPARSE_MLP, glu=None),
    "phi3": _llama_like(
        roles={
            **dict.fromkeys("qkv", "self_attn.qkv_proj"),
            "o": "self_attn.o_proj",
            **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
            "down": "mlp.down_proj",
        },
        glu=None,
        key_value_layout="concatenated",
    ),
    "phi": _llama_like(
        roles={
            **{role: f"self_attn.{role}_proj" for role in "qkv"},
            "o": "self_attn.dense",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        },
        glu=None,
        key_norm="k_layernorm",
    ),
    "gpt_neox": Architecture(
        blocks="layers",
        attention="attention",
        roles={
            **dict.fromkeys("qkv", "attention.query_key_value"),
            "o": "attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
        mlp="mlp",
        norm="input_layernorm",
        key_value_layout="interleaved",
    ),
    "gpt2": Architecture(
        blocks="h",
        attention="attn",
        roles={**dict.fromkeys("qkv", "attn.c_attn"), "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
        mlp="mlp",
        norm="ln_1",
        key_value_layout="concatenated",
    ),
    "opt": Architecture(
        blocks="layers",
        attention="self_attn",
        roles={
            **{role: f"self_attn.{role}_proj" for role in "qkv"},
            "o": "self_attn.out_proj",
            "up": "fc1",
            "down": "fc2",
        },
        mlp=["fc1", "fc2"],
        norm="self_attn_layer_norm",
    ),
    "falcon": Architecture(
        blocks="h",
        attention="self_attention",
        roles={
            **dict.fromkeys("qkv", "self_attention.query_key_value"),
            "o": "self_attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
        mlp="mlp",
        # The new decoder architecture reads ln_attn, the old one input_layernorm: the first that a block has counts.
        norm="ln_attn|input_layernorm",
        no_prompt=_NO_INTERFACE,
        no_sequence="its model does not hand further arguments on to its blocks",
    ),
}
"""The families that need no description, by the ``model_type`` of their decoder stack."""


def describe_architecture(values: dict[str, Any]) -> Architecture:
    """An architecture from the user's description.

    Raises:
        UserError: for an unknown key or value.
    """
    return build_options(Architecture, values, where="architecture")
