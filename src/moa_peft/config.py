"""`MoAConfig`: the configuration of one mixture, a native `peft.PeftConfig`.

The same keys are used in ``MoAConfig(...)``, in recipes and in ``adapter_config.json``.
"""

import re
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from peft import PeftConfig

from moa_peft.architectures import Architecture, describe_architecture
from moa_peft.errors import UserError
from moa_peft.experts import EXPERTS, ExpertOptions
from moa_peft.fields import build_options, check_choice
from moa_peft.initialization import INITS, Init
from moa_peft.losses import check_losses, loss_entries, parse_losses
from moa_peft.peft_type import MOA
from moa_peft.routers import ROUTERS, RouterOptions
from moa_peft.version import __version__

MOA_FORMAT = 2
"""Version of the adapter files; raised when older code could no longer read them rightly."""

DEFAULT_ROUTER = "sigmoid"
"""Type of the router of a configuration that names none."""

Scope = Literal["block", "module", "mlp"]
RouterInput = Literal["normed", "residual", "input", "core"]
Granularity = Literal["token", "sequence"]


@dataclass
class MoAConfig(PeftConfig):
    """Configuration of a mixture of adapters (MoA, arXiv 2506.05928).

    `MoAConfig.soft` and `MoAConfig.sparse` are the paper's configurations, `MoAConfig.preset` any named method.
    Written out, a configuration is a list of experts and a router::

        MoAConfig(
            experts=[{"type": "lora", "target": "q", "rank": 8}, {"type": "parallel", "size": 16}],
            router={"type": "sigmoid", "hidden_per_expert": 4},
        )

    Attributes:
        experts: one dictionary per expert, ``type`` and the options of `moa_peft.experts`. Their order is the order of
            the routing weights. None is Soft MoA's experts.
        router: ``type`` and the options of `moa_peft.routers`. None is the sigmoid router.
        scope: what owns one router. ``block``: each block (MoA). ``module``: each linear layer with experts, and the
            MLP. ``mlp``: the MLP of each block, all of whose routed experts are then inside it (MixLoRA).
        granularity: ``token``: one routing per token. ``sequence``: one per sequence, pooled over its prompt.
        router_input: with scope ``block``, ``normed``: the output of the norm that attention reads, or ``residual``:
            the block's input. With the others, ``input``: what the module itself reads, or, with scope ``module``,
            ``core``: what the shared A of its experts makes of that (CoMoL). None is the first of these.
        losses: auxiliary losses on the routings, one dictionary each: ``type``, ``coefficient`` and the options of
            `moa_peft.losses`. None is none.
        aux_reduce: ``local``: token statistics of the losses per process, averaged over processes. ``global``: over
            the tokens of all processes.
        init: initial weights, see `moa_peft.initialization`.
        init_from: folder or hub id of a PEFT LoRA adapter of the same base model whose weights start the LoRA experts.
        target_modules: shorthand, instead of `experts`: LoRA experts on these roles or modules and nothing else.
        exclude_modules: modules that get no expert: names (or their ends), or one regular expression over full names.
        architecture: description of a model family that `moa_peft.architectures` does not list.
        modules_to_save: further modules to train and save whole, as in PEFT.
        trainable_token_indices: tokens whose embeddings are trained, as in PEFT.
        ensure_weight_tying: keep tied embeddings tied under the two options above, as in PEFT.
        moa_format: version of the adapter files.
        moa_version: version of this package that wrote the adapter.

    Raises:
        UserError: for any value that cannot work; nothing has been changed then.
    """

    experts: list[dict[str, Any]] | None = field(default=None, metadata={"help": "Experts of the mixture."})
    router: dict[str, Any] | None = field(default=None, metadata={"help": "Router of the mixture."})
    scope: Scope = field(default="block", metadata={"help": "What owns one router: block, module or mlp."})
    granularity: Granularity = field(default="token", metadata={"help": "token or sequence."})
    router_input: RouterInput | None = field(default=None, metadata={"help": "normed, residual, input or core."})
    losses: list[dict[str, Any]] | None = field(default=None, metadata={"help": "Auxiliary losses."})
    aux_reduce: Literal["local", "global"] = field(default="local", metadata={"help": "local or global."})
    init: Init = field(default="identity", metadata={"help": "identity, reference or normal."})
    init_from: str | None = field(default=None, metadata={"help": "LoRA adapter to start the LoRA experts from."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Shorthand: LoRA experts on these roles or modules, and nothing else."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules that get no expert."})
    architecture: dict[str, Any] | None = field(default=None, metadata={"help": "Description of an unknown family."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained."}
    )
    ensure_weight_tying: bool = field(default=False, metadata={"help": "Keep tied embeddings tied."})
    moa_format: int = field(default=MOA_FORMAT, metadata={"help": "Version of the adapter files."})
    moa_version: str = field(default=__version__, metadata={"help": "Package version that wrote the adapter."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOA
        _check_format(self.moa_format, self.moa_version)
        self._check_types()
        check_choice("scope", self.scope, tuple(_ROUTER_INPUTS))
        check_choice("granularity", self.granularity, ("token", "sequence"))
        if self.router_input is None:
            self.router_input = _ROUTER_INPUTS[self.scope][0]
        check_choice(f"router_input (with scope {self.scope!r})", self.router_input, _ROUTER_INPUTS[self.scope])
        check_choice("aux_reduce", self.aux_reduce, ("local", "global"))
        check_choice("init", self.init, INITS)
        self._settle_experts()
        self.router = dict(self.router or {"type": DEFAULT_ROUTER})
        self.router = {"type": self.router.get("type")} | asdict(self.router_options())
        self._check_combination()
        losses = parse_losses(self.losses)
        check_losses(losses, self.router["type"], self.router_options())
        self.losses = loss_entries(losses) or None
        if self.architecture is not None:
            self.described_architecture()

    def _check_combination(self) -> None:
        """Refuse parts that make no sense together."""
        if self.scope != "block" and self.granularity == "sequence":
            raise UserError(
                f"granularity is 'sequence' and scope {self.scope!r}; one routing per sequence is made per block. Use "
                "scope 'block'."
            )
        routed = [(kind, entry) for kind, entry in zip(self.expert_types, self.expert_options()) if entry.routed]
        if not routed:
            self._check_unrouted()
        if self.scope != "block" and any(EXPERTS[kind].site_kind == "attention" for kind, _ in routed):
            raise UserError(
                f"scope is {self.scope!r}, and the prompt expert is no linear layer and in no MLP. Use scope 'block', "
                "or give it 'routed': false (weight 1)."
            )
        if self.router_input == "core" and any(kind not in ("core", "hydra") for kind, _ in routed):
            raise UserError(
                "router_input is 'core', what the shared A of a module's experts returns; every routed expert must be "
                "of type 'core' or 'hydra' then. Use router_input 'input'."
            )
        for kind, entry in routed:
            if entry.group is not None and EXPERTS[kind].holds_copies:
                raise UserError(f"group is {entry.group!r} on a {kind!r} expert, whose copies have a weight each.")

    def _check_unrouted(self) -> None:
        """Refuse what would make or teach routings where there are none."""
        nothing = "every expert has 'routed': false, so that there is nothing to route"
        if self.losses:
            raise UserError(f"losses is {self.losses!r}, and {nothing}. Remove losses, or route an expert.")
        # Of a saved configuration the default router is written out.
        if self.router != {"type": DEFAULT_ROUTER} | asdict(ROUTERS[DEFAULT_ROUTER].Options()):
            raise UserError(f"router is {self.router!r}, and {nothing}. Remove router, or route an expert.")

    def _check_types(self) -> None:
        for name in ("router", "architecture"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{name} is {value!r}; it must be a dictionary of its options.")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, set):
                value = sorted(value)
            if name == "modules_to_save" and isinstance(value, str):
                value = [value]
            is_names = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
            if value is not None and not isinstance(value, str) and not is_names:
                raise UserError(f"{name} is {value!r}; it must be a list of module names, or one name or pattern.")
            setattr(self, name, value)
        if isinstance(self.exclude_modules, str):
            try:
                re.compile(self.exclude_modules)
            except re.error as error:
                problem = f"exclude_modules is {self.exclude_modules!r}, no regular expression: {error}."
                raise UserError(problem) from None

    def _settle_experts(self) -> None:
        if self.target_modules is not None:
            derived = [] if self.experts is None else self.experts
            targets = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
            wanted = [{"type": "lora", "target": target} for target in targets]
            given = [{"type": e.get("type"), "target": e.get("target")} for e in derived]
            if self.experts is not None and given != wanted:
                raise UserError(
                    f"target_modules={self.target_modules!r} and experts are both given. target_modules is a "
                    "shorthand for LoRA experts and nothing else: use experts=[{'type': 'lora', 'target': ...}, ...] "
                    "alone."
                )
            if self.experts is None:
                self.experts = wanted
        if self.experts is None:
            from moa_peft.methods import moa_experts

            self.experts = moa_experts()
        if not isinstance(self.experts, (list, tuple)) or not self.experts:
            raise UserError(f"experts is {self.experts!r}; it must be a list with at least one expert.")
        settled = []
        for options, entry in zip(self.expert_options(), self.experts):
            settled.append({"type": entry["type"]} | asdict(options))
        self.experts = settled

    @property
    def expert_types(self) -> list[str]:
        """The type of each entry of `experts`."""
        return [entry["type"] for entry in self.experts or []]

    def expert_options(self) -> list[ExpertOptions]:
        """The options of each entry of `experts`, checked.

        Raises:
            UserError: naming the entry and what is wrong with it.
        """
        parsed = []
        for index, entry in enumerate(self.experts or []):
            if not isinstance(entry, dict) or "type" not in entry:
                raise UserError(f"experts[{index}] is {entry!r}; it must be a dictionary with a 'type' ({_known()}).")
            values = {key: value for key, value in entry.items() if key != "type"}
            where = f"experts[{index}] ({entry['type']})"
            try:
                parsed.append(build_options(EXPERTS[entry["type"]].Options, values, where=where))
            except UserError as error:
                raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
        return parsed

    def router_options(self) -> RouterOptions:
        """The options of `router`, checked.

        Raises:
            UserError: naming the option and what is wrong with it.
        """
        router = self.router or {}
        if "type" not in router or router["type"] is None:
            raise UserError(f"router is {self.router!r}; it needs a 'type' ({', '.join(ROUTERS)}).")
        values = {key: value for key, value in router.items() if key != "type"}
        return build_options(ROUTERS[router["type"]].Options, values, where=f"router ({router['type']})")

    def described_architecture(self) -> Architecture | None:
        """The user's description of the model family, checked, or None."""
        return None if self.architecture is None else describe_architecture(dict(self.architecture))

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse files of a newer format before their unknown keys are dropped."""
        if "moa_format" in kwargs:
            _check_format(kwargs["moa_format"], kwargs.get("moa_version", "unknown"))
        return kwargs

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a plain dictionary; `init_from` tells how training started and is left out."""
        return super().to_dict() | {"init_from": None}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and the part of the model card that only this package can write."""
        super().save_pretrained(save_directory, **kwargs)
        from moa_peft.model_card import update_model_card

        update_model_card(save_directory, self)

    @classmethod
    def soft(cls, **knobs: Any) -> "MoAConfig":
        """Soft MoA, see `moa_peft.methods.soft_moa` for the knobs."""
        return cls.preset("soft_moa", **knobs)

    @classmethod
    def sparse(cls, **knobs: Any) -> "MoAConfig":
        """Sparse MoA, see `moa_peft.methods.sparse_moa` for the knobs."""
        return cls.preset("sparse_moa", **knobs)

    @classmethod
    def preset(cls, name: str, **knobs: Any) -> Any:
        """The configuration of a named method; knobs that are no knobs of the method are fields of this class.

        Raises:
            UserError: for an unknown method or knob, or a knob of the wrong type.
        """
        from moa_peft.methods import method_config

        return method_config(name, **knobs)


_ROUTER_INPUTS: dict[str, tuple[RouterInput, ...]] = {
    "block": ("normed", "residual"),
    "module": ("input", "core"),
    "mlp": ("input",),
}


def _known() -> str:
    return ", ".join(EXPERTS)


def _check_format(moa_format: Any, written_by: str) -> None:
    if type(moa_format) is not int or moa_format < 1:
        raise UserError(f"moa_format is {moa_format!r}; it must be a positive integer.")
    if moa_format > MOA_FORMAT:
        raise UserError(
            f"This adapter was written by moa-peft {written_by} in format {moa_format}; this is moa-peft "
            f"{__version__}, which reads formats up to {MOA_FORMAT}. Upgrade with: pip install -U moa-peft"
        )
    if moa_format < MOA_FORMAT:
        warnings.warn(f"Reading an adapter of the older format {moa_format}.", stacklevel=3)
