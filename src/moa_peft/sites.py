"""Where the experts of a configuration sit in the blocks of a model: sites, and the slots that take them."""

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from moa_peft.architectures import ROLES, Architecture
from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.experts import EXPERTS, Expert, ExpertOptions, SiteShape
from moa_peft.experts.lora import LoraOptions

Site = tuple[str, str]
"""Names in the block of the module that is read and the module that is added to (often the same one)."""


BLOCK = "block"
"""Name of the mixture whose router belongs to the block."""

MLP = "mlp"
"""Name of the mixture whose router belongs to the MLP."""

UNROUTED = "unrouted"
"""Name of the mixture of the experts whose weight is 1."""


@dataclass(frozen=True)
class Slot:
    """One expert of one block.

    Attributes:
        name: name of the expert among the block's, part of its tensors' names on disk.
        expert_type: its type in `EXPERTS`.
        options: its options.
        modules: its site.
        shape: sizes of the site.
        mixture: name of its mixture in the block.
        copies: how many columns of the routing it has: more than one where copies share weights.
    """

    name: str
    expert_type: str
    options: ExpertOptions
    modules: Site
    shape: SiteShape
    mixture: str
    copies: int = 1

    def expert(self) -> Expert:
        """The expert, with weights that are not set yet."""
        kind = EXPERTS[self.expert_type]
        return kind(self.shape, self.options, self.copies) if kind.holds_copies else kind(self.shape, self.options)


def submodule(block: nn.Module, name: str) -> nn.Module | None:
    """The module called `name` in `block`, or None."""
    module: nn.Module | None = block
    for part in name.split("."):
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return None
    return module


def linear_features(module: nn.Module | None) -> tuple[int, int] | None:
    """Input and output width of a linear layer of any class (quantised, Conv1D); None for other modules."""
    if module is None:
        return None
    if hasattr(module, "nf") and hasattr(module, "nx"):
        return module.nx, module.nf  # type: ignore[return-value]
    if isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    ):
        return module.in_features, module.out_features  # type: ignore[return-value]
    return None


class SiteFinder:
    """Finds the sites of one configuration in the blocks of one model."""

    def __init__(self, config: MoAConfig, architecture: Architecture, model: nn.Module) -> None:
        self.config = config
        self.architecture = architecture
        self.model = model

    def excluded(self, name: str) -> bool:
        """Whether `exclude_modules` names the module."""
        patterns = self.config.exclude_modules
        if not patterns:
            return False
        if isinstance(patterns, str):
            return re.fullmatch(patterns, name) is not None
        return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)

    def slots(
        self, expert_type: str, options: ExpertOptions, copies: int, block_name: str, block: nn.Module
    ) -> list[Slot]:
        """The slots that one entry of the configuration takes in one block; none where the block has no such site."""
        kind = EXPERTS[expert_type].site_kind
        if kind == "linear":
            assert isinstance(options, LoraOptions)
            targets = [options.target] if isinstance(options.target, str) else options.target
            # Roles that share a linear layer are one expert.
            paths = list(dict.fromkeys(path for target in targets for path in self._linears(target, block)))
            prefix = f"{expert_type}_"
            found = [
                (prefix + self._linear_name(path), (path, path), self._linear_shape(path, block)) for path in paths
            ]
        elif kind == "mlp":
            found = self._mlp(block)
        elif kind == "gated_mlp":
            found = self._gated_mlp(expert_type, options, block_name, block)
        else:
            found = self._attention(expert_type, options, block_name, block)
        each, times = (copies, 1) if EXPERTS[expert_type].holds_copies else (1, copies)
        return [
            Slot(name, expert_type, options, modules, shape, self._mixture(options, modules), each)
            for name, modules, shape in found
            for _ in range(times)
        ]

    def _mixture(self, options: ExpertOptions, modules: Site) -> str:
        """Which mixture an expert at a site belongs to.

        Raises:
            UserError: where the scope has no router for it.
        """
        if not options.routed:
            return UNROUTED
        if self.config.scope == "block":
            return BLOCK
        mlp = self.architecture.mlp
        first = mlp[0] if isinstance(mlp, list) else mlp
        if first is None and self.config.scope == "mlp":
            raise UserError(
                "scope is 'mlp', and this model's blocks have no MLP module whose input a router could read "
                "(architecture.mlp is null). Use scope 'block' or 'module'."
            )
        roles = self.architecture.roles_of(modules[0])
        if modules[0] == first and (not roles or modules[1] != first):
            return MLP
        if self.config.scope == "module":
            return "_".join(roles) or modules[0].replace(".", "_")
        if not set(roles) & {"gate", "up", "down"} and not modules[0].startswith(f"{first}."):
            raise UserError(
                f"scope is 'mlp', and {modules[0]} is not in the MLP. Give its expert 'routed': false (weight 1), "
                "leave it out, or use scope 'block' or 'module'."
            )
        return MLP

    def _linears(self, target: str, block: nn.Module) -> list[str]:
        if target in ROLES:
            path = self.architecture.roles.get(target)
            return [path] if path and linear_features(submodule(block, path)) else []
        linears = [name for name, module in block.named_modules() if name and linear_features(module)]
        linears = [name for name in linears if "moa" not in name.split(".")]
        named = [name for name in linears if name == target or name.endswith(f".{target}")]
        return named or [name for name in linears if _fullmatch(target, name)]

    def _linear_name(self, path: str) -> str:
        roles = self.architecture.roles_of(path)
        return "_".join(roles) if roles else path.replace(".", "_")

    def _linear_shape(self, path: str, block: nn.Module) -> SiteShape:
        features = linear_features(submodule(block, path))
        assert features is not None
        return SiteShape(*features)

    def _mlp(self, block: nn.Module) -> list[tuple[str, tuple[str, str], SiteShape]]:
        mlp = self.architecture.mlp
        if mlp is None:
            return []
        first, last = (mlp, mlp) if isinstance(mlp, str) else mlp
        if submodule(block, first) is None or submodule(block, last) is None:
            return []
        width = self.hidden_size
        return [("parallel_adapter", (first, last), SiteShape(width, width))]

    def _gated_mlp(
        self, expert_type: str, options: ExpertOptions, block_name: str, block: nn.Module
    ) -> list[tuple[str, Site, SiteShape]]:
        mlp, roles = self.architecture.mlp, self.architecture.roles
        activation = self.architecture.glu
        if activation is None or not isinstance(mlp, str) or submodule(block, activation) is None:
            if options.optional:
                return []
            raise UserError(
                f"The {expert_type} expert needs an MLP made of gate, up, activation and down modules, and block "
                f"{block_name} has none. Use LoRA experts on its linear layers instead."
            )
        features = linear_features(submodule(block, roles["gate"]))
        assert features is not None
        return [(expert_type, (mlp, mlp), SiteShape(*features))]

    def _attention(
        self, expert_type: str, options: ExpertOptions, block_name: str, block: nn.Module
    ) -> list[tuple[str, tuple[str, str], SiteShape]]:
        path = self.architecture.attention
        roles = self.architecture.roles
        if submodule(block, path) is None or "k" not in roles or submodule(block, roles["k"]) is None:
            return []
        if self.architecture.no_prompt is not None:
            if options.optional:
                return []
            raise UserError(
                f"The {expert_type} expert cannot work in block {block_name} of this family: "
                f"{self.architecture.no_prompt}. Leave it out (prompt=False in the presets)."
            )
        heads = self._text_config().num_attention_heads
        return [("prompt_expert", (path, path), SiteShape(self.hidden_size, self.hidden_size, heads))]

    def _text_config(self) -> PreTrainedConfig:
        config = self.model.config
        assert isinstance(config, PreTrainedConfig)
        return config.get_text_config()

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self._text_config().hidden_size


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(
            f"target {pattern!r} is neither a role, nor a module name, nor a regular expression: {error}."
        ) from None
