"""`MoAConfig` and the presets: what they mean, that every knob acts, and what is refused."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from moa_peft import MoAConfig, UserError
from moa_peft.counting import count_adapter
from moa_peft.methods import METHODS
from tests.models import tiny_batch, tiny_model

SOFT_ORDER = ["lora", "lora", "lora", "prompt", "lora", "lora", "parallel"]


def expert_names(config: MoAConfig, family: str = "llama") -> list[str]:
    model = get_peft_model(tiny_model(family), config)
    return [slot.name for slot in model.get_base_model().model.layers[0].moa.mixtures["default"].slots]


def test_the_papers_configurations():
    soft, sparse = MoAConfig.soft(), MoAConfig.sparse()
    assert soft.expert_types == SOFT_ORDER
    assert [e.get("target") for e in soft.experts] == ["q", "k", "v", None, "o", "down", None]
    assert soft.router["threshold"] == "none" and soft.router["hidden_per_expert"] == 4
    assert sparse.expert_types == [t for t in SOFT_ORDER if t != "prompt"]
    assert sparse.router["threshold"] == "learned" and sparse.router["max_threshold"] == 0.5
    assert sparse.router["threshold_gradient"] == "straight_through"
    assert soft.router_input == "normed" and soft.scope == "block" and soft.granularity == "token"
    for entry in soft.experts:
        assert entry.get("rank", 8) == 8 and entry.get("size", 16) == 16 and entry.get("length", 10) == 10
    assert MoAConfig().experts == soft.experts


def test_the_order_of_experts_is_the_order_of_weights():
    assert expert_names(MoAConfig.soft()) == [
        "lora_q",
        "lora_k",
        "lora_v",
        "prompt_expert",
        "lora_o",
        "lora_down",
        "parallel_adapter",
    ]


def test_names_of_several_experts_at_one_site():
    config = MoAConfig(
        experts=[
            {"type": "lora", "target": "q", "num": 2},
            {"type": "lora", "target": "self_attn.q_proj", "rank": 2},
            {"type": "lora", "target": r"mlp\.(up|gate)_proj"},
            {"type": "parallel"},
        ]
    )
    assert expert_names(config) == ["lora_q_0", "lora_q_1", "lora_q_2", "lora_gate", "lora_up", "parallel_adapter"]


def test_roles_of_a_fused_layer_become_one_expert():
    assert expert_names(MoAConfig.soft(), "phi3")[:2] == ["lora_q_k_v", "prompt_expert"]
    config = MoAConfig(experts=[{"type": "lora", "target": "q"}, {"type": "lora", "target": "k", "rank": 2}])
    with pytest.raises(UserError, match="one fused layer"):
        get_peft_model(tiny_model("phi3"), config)


def test_routers_and_losses_need_an_expert_to_route():
    experts = [{"type": "lora", "target": ["q", "v"], "routed": False}]
    config = MoAConfig(experts=experts)
    assert MoAConfig(**config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(UserError, match=r"losses is .*every expert has 'routed': false.*Remove losses"):
        MoAConfig(experts=experts, losses=[{"type": "balance", "coefficient": 5.0}])
    for router in ({"type": "top_k", "k": 2}, {"type": "sigmoid", "threshold": "learned"}):
        with pytest.raises(UserError, match=r"router is .*every expert has 'routed': false.*Remove router"):
            MoAConfig(experts=experts, router=router)
        MoAConfig(experts=[*experts, {"type": "parallel", "num": 2}], router=router)


def test_round_trips():
    config = MoAConfig.sparse(rank=4, layers="0-1", task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    for twin in (
        MoAConfig(**json.loads(json.dumps(config.to_dict()))),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert twin.to_dict() == config.to_dict()
        assert twin.peft_type == config.peft_type


def test_saved_and_loaded_by_peft(tmp_path):
    config = MoAConfig.sparse(rank=4, init_from="somewhere")
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoAConfig)
    assert loaded.experts == config.experts and loaded.router == config.router
    assert loaded.init_from is None, "how training started is no part of the adapter"


def test_a_newer_format_is_refused_with_its_version(tmp_path):
    config = MoAConfig.soft()
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text()) | {"moa_format": 99, "moa_version": "9.9", "new_field": 1}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"moa-peft 9\.9 in format 99"):
        PeftConfig.from_pretrained(tmp_path)


def test_target_modules_is_a_shorthand():
    config = MoAConfig(target_modules=["q_proj", "v_proj"])
    assert [e["target"] for e in config.experts] == ["q_proj", "v_proj"]
    assert expert_names(config) == ["lora_q", "lora_v"]
    assert MoAConfig(**config.to_dict()).experts == config.experts
    with pytest.raises(UserError, match="both given"):
        MoAConfig(target_modules=["q_proj"], experts=[{"type": "parallel"}])


def _logits(config: MoAConfig, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model("llama"), config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
        return model(**tiny_batch()).logits


# Every field of the configuration and every knob of the presets, with a value that must change something.
CHANGES = [
    {"router_input": "residual"},
    {"granularity": "sequence"},
    {"exclude_modules": ["q_proj"]},
    {"target_modules": ["q"], "preset": None},
    {"alpha": 3},
    {"rslora": True},
    {"rank": 5},
    {"targets": ["q"]},
    {"adapter_size": 3},
    {"adapter_size": 0},
    {"prompt": True},
    {"prompt": True, "prompt_length": 3},
    {"layers": [1]},
    {"hidden_per_expert": 0},
    {"hidden_per_expert": 2},
    {"threshold": "constant"},
    {"threshold": "none"},
    {"max_threshold": 0.9},
    {"threshold_gradient": "shifted"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_knob_changes_the_output(change: dict[str, object]):
    change = dict(change)
    make = MoAConfig if change.pop("preset", "sparse") is None else MoAConfig.sparse
    assert not torch.equal(_logits(make(**change)), _logits(MoAConfig.sparse()))


def test_dropout_and_init_act():
    for knobs in ({"init": "normal"}, {"init": "reference"}):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama"), MoAConfig.sparse(**knobs)).eval()
        with torch.no_grad():
            assert not torch.equal(model(**tiny_batch()).logits, tiny_model("llama")(**tiny_batch()).logits)
    assert MoAConfig.soft(dropout=0.3).experts[0]["dropout"] == 0.3


def test_lora_preset_is_pefts_own():
    config = MoAConfig.preset("lora", rank=4, targets=["q_proj"], task_type="CAUSAL_LM")
    assert isinstance(config, LoraConfig) and config.r == config.lora_alpha == 4
    model = get_peft_model(tiny_model("llama"), config)
    assert count_adapter(model).total == count_adapter(model).other > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MoAConfig.preset("soft_mao"), "Did you mean 'soft_moa'"),
        (lambda: MoAConfig.soft(ranks=4), "Did you mean 'rank'"),
        (lambda: MoAConfig.soft(rank=0), r"experts\[0\] \(lora\): rank is 0"),
        (lambda: MoAConfig.soft(rank="eight"), "rank is 'eight'; it must be a whole number"),
        (lambda: MoAConfig.soft(adapter_size=True), "adapter_size is True; it must be a whole number"),
        (lambda: MoAConfig.soft(prompt="yes"), "prompt is 'yes'; it must be true or false"),
        (lambda: MoAConfig.sparse(max_threshold="half"), "max_threshold is 'half'; it must be a number"),
        (lambda: MoAConfig.soft(targets=5), "targets is 5; it must be a list of names"),
        (lambda: MoAConfig.preset("lora", targets=[5]), r"targets is \[5\]; it must be a list of names"),
        (lambda: MoAConfig.preset("lora", rank=0), "rank is 0; it must be an integer of at least 1"),
        (lambda: MoAConfig.preset("lora", targets="all-linear", layers=[0]), "'all-linear' stands alone"),
        (lambda: MoAConfig.preset("lora", targets=["all-linear", "q"]), "'all-linear' stands alone"),
        (lambda: MoAConfig.soft(router_input="raw"), "'normed', 'residual'"),
        (lambda: MoAConfig.soft(granularity="word"), "'token', 'sequence'"),
        (lambda: MoAConfig.soft(scope="module"), "'block'"),
        (lambda: MoAConfig.soft(init="ones"), "'identity'"),
        (lambda: MoAConfig(experts=[]), "at least one expert"),
        (lambda: MoAConfig(experts=[{"rank": 4}]), "'type'"),
        (lambda: MoAConfig(experts=[{"type": "adapter"}]), "Known: core, hydra, lora"),
        (lambda: MoAConfig(experts=[{"type": "lora", "target": "q", "r": 4}]), "unknown option 'r'"),
        (lambda: MoAConfig(experts=[{"type": "lora"}]), "'target' is required"),
        (lambda: MoAConfig(router={"type": "sigmoid", "max_treshold": 1}), "Did you mean 'max_threshold'"),
        (lambda: MoAConfig(router={"threshold": "none"}), "needs a 'type'"),
        (lambda: MoAConfig(moa_format=0), "moa_format is 0"),
        (lambda: MoAConfig(moa_format=True), "moa_format is True"),
        (lambda: MoAConfig(router="sigmoid"), "router is 'sigmoid'"),
        (lambda: MoAConfig(router={"type": []}), "Known: adamole"),
        (lambda: MoAConfig(experts=[{"type": ["lora"]}]), "Known: core"),
        (lambda: MoAConfig(experts=[{1: 2, "type": "lora", "target": "q"}]), "unknown option 1"),
        (lambda: MoAConfig(target_modules=5), "target_modules is 5"),
        (lambda: MoAConfig(exclude_modules=[5]), "exclude_modules is"),
        (lambda: MoAConfig(exclude_modules="("), "no regular expression"),
        (lambda: MoAConfig(architecture="llama"), "architecture is 'llama'"),
        (lambda: MoAConfig.soft(alpha=float("inf")), "alpha is inf"),
        (lambda: MoAConfig(architecture={"blocks": "layers"}), "'attention' is required"),
    ],
)
def test_wrong_values_say_what_is_allowed(make, words: str):
    with pytest.raises(UserError, match=words):
        make()


def test_one_target_needs_no_list():
    """Read letter by letter, 'down' would hold the role 'o'."""
    experts = MoAConfig.soft(targets="down", prompt=False, adapter_size=0).experts
    assert [expert["target"] for expert in experts] == ["down"]


def test_methods_tell_their_knobs():
    assert set(METHODS) >= {"soft_moa", "sparse_moa", "lora"}
    assert METHODS["sparse_moa"].knobs["max_threshold"] == 0.5
    assert "config" not in METHODS["soft_moa"].knobs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules_to_save": ["nope"]}, "modules_to_save names 'nope'"),
        ({"trainable_token_indices": [96]}, "names token 96"),
        ({"trainable_token_indices": "x"}, "a list of token ids"),
    ],
)
def test_saved_modules_are_checked_before_the_model_is_changed(options: dict[str, object], words: str):
    model = tiny_model("llama")
    before = list(model.state_dict())
    with pytest.raises(UserError, match=words):
        get_peft_model(model, MoAConfig.soft(**options))
    assert list(model.state_dict()) == before
    get_peft_model(model, MoAConfig.soft(modules_to_save="lm_head"))
