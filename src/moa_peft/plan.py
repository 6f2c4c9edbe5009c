"""From a configuration and a model to the experts of every block, before anything is changed.

Every check of a configuration against a model is made here, so that a refused one leaves the model as it was.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from moa_peft.architectures import ARCHITECTURES, ROLES, Architecture
from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.experts import ExpertOptions
from moa_peft.experts.lora import LoraOptions
from moa_peft.losses import check_losses, parse_losses
from moa_peft.mixture import mixtures_of
from moa_peft.routers import ROUTERS
from moa_peft.sites import UNROUTED, SiteFinder, Slot, submodule
from moa_peft.swapped_class import runs_own_forward


@dataclass(frozen=True)
class Plan:
    """The experts of every block that gets any.

    Attributes:
        architecture: what the blocks call their parts.
        blocks: full name of a block to its slots, in routing order.
        excluded: full names of the blocks and sites that `exclude_modules` took out.
    """

    architecture: Architecture
    blocks: Mapping[str, tuple[Slot, ...]]
    excluded: frozenset[str] = frozenset()


def make_plan(config: MoAConfig, model: nn.Module) -> Plan:
    """Resolve every expert of `config` in every block of `model`; changes nothing.

    Raises:
        UserError: if the family is unknown, a listed expert has no site, or nothing is left to adapt.
    """
    architecture, blocks = find_blocks(config, model)
    if config.granularity == "sequence" and architecture.no_sequence:
        raise UserError(
            f"granularity 'sequence' cannot be used with this family: {architecture.no_sequence}. Use 'token'."
        )
    if config.losses and architecture.no_sequence:
        raise UserError(
            f"losses cannot be used with this family: {architecture.no_sequence}, so padding could not be left out. "
            "Use losses=None."
        )
    options = config.expert_options()
    _check_layers(options, len(blocks))
    sites = SiteFinder(config, architecture, model)
    found: dict[int, int] = Counter()
    plan: dict[str, tuple[Slot, ...]] = {}
    excluded: set[str] = set()
    for index, (block_name, block) in enumerate(blocks.items()):
        drafts = []
        for entry, (expert_type, expert_options) in enumerate(zip(config.expert_types, options)):
            layers = expert_options.layer_indices()
            if layers is not None and index not in layers:
                continue
            copies = expert_options.copies(index, len(blocks))
            slots = sites.slots(expert_type, expert_options, copies, block_name, block)
            found[entry] += len(slots)
            for slot in slots:
                site = f"{block_name}.{slot.modules[1]}"
                if sites.excluded(site):
                    excluded.add(site)
                else:
                    drafts.append(slot)
        if sites.excluded(block_name):
            excluded.add(block_name)
        elif drafts:
            plan[block_name] = tuple(_numbered(_shared_roles(drafts)))
    _check_found(config, options, found, sites, model)
    for block_name in plan:
        if not runs_own_forward(blocks[block_name]):
            raise UserError(
                f"The forward of block {block_name} was replaced on the instance, so a mixture could not route in it. "
                "Add the adapter first, and the other patch afterwards, or patch the block's class instead."
            )
    if not plan:
        raise UserError(
            "No module is left to adapt: exclude_modules and layers leave none of the experts a site. "
            f"exclude_modules={config.exclude_modules!r}."
        )
    _check_mixtures(config, plan)
    return Plan(architecture, plan, frozenset(excluded))


def _check_mixtures(config: MoAConfig, plan: Mapping[str, tuple[Slot, ...]]) -> None:
    """Refuse routers and losses that make no sense with the number of experts they get."""
    assert config.router is not None
    kind = config.router["type"]
    sizes = {}
    for block, slots in plan.items():
        for name, mixture in mixtures_of(slots).items():
            if name == UNROUTED:
                continue
            sizes[f"{block}.{name}"] = mixture.num_columns
            if config.router_input == "core" and len(mixture.slots) > 1:
                raise UserError(
                    f"router_input is 'core', and {block}.{name} has {len(mixture.slots)} experts with an A of their "
                    f"own ({', '.join(mixture.expert_names)}), of which a router could read one. Give the site one "
                    "'core' or 'hydra' entry (its num copies share an A), or use router_input 'input'."
                )
    for name, size in sizes.items():
        if size == 1 and ROUTERS[kind].scores_are_probabilities:
            raise UserError(
                f"The router {kind!r} of {name} has one expert, whose weight would always be 1, and would learn "
                "nothing. Give it more experts (num), make that one 'routed': false, or use a sigmoid router."
            )
    losses = parse_losses(config.losses)
    check_losses(losses, kind, config.router_options(), num_experts=sorted(set(sizes.values())))


def find_blocks(config: MoAConfig, model: nn.Module) -> tuple[Architecture, dict[str, nn.Module]]:
    """The architecture of `model` and its blocks by full name.

    Raises:
        UserError: if the family is neither listed nor described, or the description does not fit the model.
    """
    described = config.described_architecture()
    if described is not None:
        return described, _described_blocks(described, model)
    stacks = []
    for name, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
        if architecture is None or not isinstance(module, PreTrainedModel):
            continue
        blocks = getattr(module, architecture.blocks, None)
        if isinstance(blocks, nn.ModuleList):
            stacks.append((architecture, _named(f"{name}.{architecture.blocks}".lstrip("."), blocks)))
    if len(stacks) == 1:
        return stacks[0]
    if stacks:
        raise UserError(
            f"The model holds {len(stacks)} decoder stacks ({', '.join(next(iter(b)) for _, b in stacks)}); a mixture "
            "needs exactly one. Describe the one to adapt with MoAConfig(architecture={'blocks': FULL_NAME, ...})."
        )
    model_type = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    raise UserError(
        f"Model family {model_type!r} is not known. Known families: {', '.join(ARCHITECTURES)}. Only decoders are in "
        "scope (no encoders, no encoder-decoder models). Another decoder can be described: MoAConfig(architecture="
        "{'blocks': 'model.layers', 'attention': 'self_attn', 'roles': {'q': 'self_attn.q_proj', 'down': "
        "'mlp.down_proj'}, 'mlp': 'mlp', 'norm': 'input_layernorm'}), with the names of its own modules."
    )


def _described_blocks(architecture: Architecture, model: nn.Module) -> dict[str, nn.Module]:
    matches = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and (name == architecture.blocks or name.endswith(f".{architecture.blocks}"))
    ]
    if len(matches) != 1:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise UserError(
            f"architecture.blocks is {architecture.blocks!r}, which names {len(matches)} module lists of the model; "
            f"it must name one of: {', '.join(lists) or 'none (the model has no module list)'}."
        )
    blocks = _named(*matches[0])
    first = next(iter(blocks.values()))
    names = [architecture.attention, *architecture.roles.values()]
    names += [architecture.glu] if architecture.glu else []
    names += [architecture.mlp] if isinstance(architecture.mlp, str) else architecture.mlp or []
    for name in names:
        if submodule(first, name) is None:
            raise UserError(f"architecture: the blocks have no module {name!r}. They have: {_children(first)}.")
    if architecture.norm and norm_name(architecture, first) is None:
        raise UserError(f"architecture.norm is {architecture.norm!r}; the blocks have: {_children(first)}.")
    return blocks


def _named(name: str, blocks: nn.ModuleList) -> dict[str, nn.Module]:
    return {f"{name}.{index}": block for index, block in enumerate(blocks)}


def _children(block: nn.Module) -> str:
    return ", ".join(name for name, _ in block.named_modules() if name)


def norm_name(architecture: Architecture, block: nn.Module) -> str | None:
    """The norm of `block` whose output attention reads; where families have variants, the first name that exists."""
    for name in (architecture.norm or "").split("|"):
        if name and submodule(block, name) is not None:
            return name
    return None


def _shared_roles(slots: list[Slot]) -> list[Slot]:
    """One slot where several entries name roles of one fused linear layer; their options must then agree."""
    kept: list[Slot] = []
    for slot in slots:
        twin = next((s for s in kept if s.name == slot.name and _is_fused_twin(s, slot)), None)
        if twin is None:
            kept.append(slot)
        elif _without_target(twin) != _without_target(slot):
            raise UserError(
                f"Experts for the roles of one fused layer ({slot.modules[0]}) have different options: "
                f"{_without_target(twin)} and {_without_target(slot)}. List one of them, or give both the same "
                "options."
            )
    return kept


def _is_fused_twin(first: Slot, second: Slot) -> bool:
    a, b = first.options, second.options
    if a is b or not (isinstance(a, LoraOptions) and isinstance(b, LoraOptions)):
        return False
    one, other = ({t.target} if isinstance(t.target, str) else set(t.target) for t in (a, b))
    return one.isdisjoint(other) and (one | other) <= set(ROLES)


def _without_target(slot: Slot) -> dict[str, object]:
    return {key: value for key, value in vars(slot.options).items() if key != "target"}


def _numbered(slots: list[Slot]) -> list[Slot]:
    """Names made unique: where a name occurs more than once, ``name_0``, ``name_1``, ..."""
    counts = Counter(slot.name for slot in slots)
    seen: dict[str, int] = Counter()
    numbered = []
    for slot in slots:
        name = slot.name
        if counts[slot.name] > 1:
            name = f"{slot.name}_{seen[slot.name]}"
            seen[slot.name] += 1
        numbered.append(replace(slot, name=name))
    return numbered


def _check_layers(options: list[ExpertOptions], num_blocks: int) -> None:
    for index, entry in enumerate(options):
        beyond = [i for i in entry.layer_indices() or () if i >= num_blocks]
        if beyond:
            raise UserError(
                f"experts[{index}]: layers={entry.layers!r} names block {max(beyond)}; the model has blocks 0 to "
                f"{num_blocks - 1}."
            )


def _check_found(
    config: MoAConfig, options: list[ExpertOptions], found: dict[int, int], sites: SiteFinder, model: nn.Module
) -> None:
    missing = []
    for index, (expert_type, entry) in enumerate(zip(config.expert_types, options)):
        if found[index]:
            continue
        what = f"{expert_type} on {entry.target!r}" if isinstance(entry, LoraOptions) else expert_type
        if not entry.optional:
            raise UserError(
                f"experts[{index}] ({what}) has no site in this model ({type(model).__name__}), which has "
                f"{_available(sites.architecture)}. Name one of these, a linear layer of the block, or leave the "
                "expert out."
            )
        missing.append(what)
    if missing:
        warnings.warn(
            f"{type(model).__name__} has no site for: {', '.join(missing)}. The mixture goes without.", stacklevel=2
        )


def _available(architecture: Architecture) -> str:
    sites = [f"the roles {', '.join(architecture.roles) or 'none'}"]
    sites.append("an MLP for parallel adapters" if architecture.mlp else "no MLP module for parallel adapters")
    if architecture.no_prompt:
        sites.append(f"no prompt expert ({architecture.no_prompt})")
    return "; ".join(sites)
