"""The named methods: what they are made of, that every knob acts, how parts compose, and what is refused."""

import inspect
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moa_peft import MoAConfig, UserError, record_routing
from moa_peft.cli import main
from moa_peft.methods import METHODS, method_config, moa_experts
from moa_peft.methods.registry import EXPERT_KNOBS
from tests.models import randomise, tiny_batch, tiny_model

MIXTURES = [name for name in METHODS if name != "lora"]

# A value of every knob that no method has as its default.
OTHER: dict[str, Any] = {
    "rank": 5,
    "alpha": 3.0,
    "dropout": 0.25,
    "rslora": True,
    "targets": ["k"],
    "layers": [1],
    "num_experts": 3,
    "adapter_size": 7,
    "prompt_length": 3,
    "hidden_per_expert": 2,
    "threshold": "constant",
    "max_threshold": 0.1,
    "threshold_gradient": "shifted",
    "threshold_temperature": 0.3,
    "weight": 0.5,
    "top_k": 3,
    "noise": True,
    "balance_coefficient": 0.3,
    "entropy_coefficient": 0.3,
    "sparsity_coefficient": 0.3,
    "sparsity_k": 1,
    "top_p": 0.5,
    "keep_top_k": 1,
    "entropy_threshold": 0.5,
    "entropy_index": 2.0,
    "hidden": 16,
    "epsilon": 0.1,
}


def small(name: str, **knobs: Any) -> Any:
    return method_config(name, task_type="CAUSAL_LM", **knobs)


def adapted(config: Any, family: str = "llama", *, trained: bool = True) -> Any:
    torch.manual_seed(11)
    model = get_peft_model(tiny_model(family), config)
    if trained:
        randomise(model, std=0.3, seed=5, only_trainable=True)
    return model


# ---------------------------------------------------------------------------------------------------- every method


def test_all_methods_are_there():
    assert set(METHODS) == {
        *("soft_moa", "sparse_moa", "instance_moa", "unipeft", "naive_composition", "parallel_adapter", "prompt"),
        *("lora", "molora", "hydralora", "moe_lora_topk", "adamole", "mixlora", "mola", "dynmole", "ld_mole", "comol"),
    }
    for method in METHODS.values():
        assert method.formula.isascii() and method.formula.startswith("out = ") and method.source.startswith("arXiv ")
        assert len((inspect.getdoc(method.build) or "").splitlines()[0]) > 20


def test_knobs_have_the_same_names_everywhere():
    for method in METHODS.values():
        experts = set(method.knobs) & EXPERT_KNOBS
        if "rank" in experts:
            assert {"rank", "alpha", "dropout", "rslora", "targets", "layers"} <= experts
        assert "layers" in experts
        unknown = {knob for knob in method.knobs if knob not in OTHER and knob not in ("prompt", "bias")}
        assert not unknown, f"{method.name}: add {unknown} to OTHER"


@pytest.mark.parametrize("name", METHODS)
def test_every_knob_acts(name: str):
    before = small(name).to_dict()
    for knob, default in METHODS[name].knobs.items():
        value = not default if isinstance(default, bool) else OTHER[knob]
        # What reads these is off by default.
        more: dict[str, Any] = {"sparsity_coefficient": 0.1} if knob == "sparsity_k" else {}
        more |= {"prompt": True} if knob == "prompt_length" and "prompt" in METHODS[name].knobs else {}
        after = small(name, **{knob: value}, **more).to_dict()
        assert after != (small(name, **more).to_dict() if more else before), knob


@pytest.mark.parametrize("name", MIXTURES)
def test_configurations_survive_a_round_trip(name: str):
    config = small(name)
    assert MoAConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", MIXTURES)
def test_adding_a_method_changes_nothing_and_training_it_does(name: str):
    batch = tiny_batch()
    with torch.no_grad():
        base = tiny_model("llama")(**batch).logits
        model = adapted(small(name), trained=False).eval()
        torch.testing.assert_close(model(**batch).logits, base, rtol=1e-5, atol=1e-5)
    model = adapted(small(name)).train()
    output = model(**batch)
    assert not torch.allclose(output.logits, base, rtol=1e-2, atol=1e-2)
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients.values())
    moved = {n for n, gradient in gradients.items() if gradient is not None and gradient.any()}
    assert len(moved) > 0.7 * len(gradients), set(gradients) - moved
    routers = [n for n in gradients if ".moa_router." in n]
    assert all(n in moved for n in routers)


# ---------------------------------------------------------------------------------------- what the methods are made of


def test_lora_is_pefts_own():
    config = small("lora", layers="0-1,3", rank=4)
    assert isinstance(config, LoraConfig) and config.layers_to_transform == [0, 1, 3] and config.r == 4
    config = small("lora", targets=["q_proj"])
    assert config.target_modules == {"q_proj"} and config.exclude_modules is None
    assert small("lora", targets=["q"], exclude_modules=["layers.0"]).exclude_modules == {"layers.0"}
    config = small("lora", targets="all-linear")
    assert config.target_modules == "all-linear"
    model = get_peft_model(tiny_model("llama"), config)
    assert "lora_A" in dict(model.get_base_model().model.layers[1].mlp.gate_proj.named_children())


def test_gates_of_unipeft_are_one_per_kind():
    model = adapted(small("unipeft")).eval()
    with torch.no_grad(), record_routing(model) as record:
        model(**tiny_batch())
    for routings in record.routings.values():
        assert routings[-1].weights.shape[-1] == 3
        weights = routings[-1].weights.reshape(3, -1, 3)
        assert torch.equal(weights, weights[:, :1].expand_as(weights)), "one routing per sequence"


def test_naive_composition_is_the_sum_of_its_experts():
    """With the weight 1 everywhere; another weight gives another output."""
    outputs = {}
    for weight in (1.0, 0.5):
        model = adapted(small("naive_composition", weight=weight)).eval()
        assert not [n for n, _ in model.named_parameters() if "moa_router" in n]
        with torch.no_grad():
            outputs[weight] = model(**tiny_batch()).logits
    unrouted = small("naive_composition")
    unrouted.experts = [entry | {"routed": False} for entry in unrouted.experts]
    with torch.no_grad():
        alone = adapted(MoAConfig(experts=unrouted.experts, task_type="CAUSAL_LM")).eval()(**tiny_batch()).logits
    torch.testing.assert_close(outputs[1.0], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[1.0], outputs[0.5], atol=1e-2)


def test_layers_of_mola_have_their_own_numbers_of_experts():
    model = adapted(small("mola", num_experts=[2, 4]))
    layers = model.get_base_model().model.layers
    names = [{n.rpartition("_")[0] for n in layer.moa.moa_experts["default"]} for layer in layers]
    assert names[0] == names[1] == {f"lora_{role}" for role in ("q", "k", "v", "o", "gate", "up", "down")}
    assert [len(layer.moa.moa_experts["default"]) for layer in layers] == [2 * 7, 4 * 7]


def test_experts_of_hydralora_share_one_a():
    layer = adapted(small("hydralora", num_experts=3)).get_base_model().model.layers[0]
    tensors = dict(layer.moa.moa_experts["default"].named_parameters())
    down = sorted(name for name in tensors if "down" in name)
    assert [name.partition(".")[2] for name in down] == [
        "lora_A.weight",
        "lora_B.0.weight",
        "lora_B.1.weight",
        "lora_B.2.weight",
    ]


def test_losses_of_the_papers():
    assert small("molora").losses is None and small("mola").losses is None
    assert [loss["type"] for loss in small("dynmole").losses] == ["entropy", "balance"]
    assert small("dynmole", entropy_index=1.5).losses[0]["q"] == 1.5
    assert [loss["type"] for loss in small("dynmole", entropy_coefficient=0.0).losses] == ["balance"]
    assert [loss["type"] for loss in small("ld_mole", sparsity_coefficient=0.1).losses] == ["balance", "sparsity"]
    assert small("ld_mole").losses[0]["normalised"] is True
    assert small("moe_lora_topk", balance_coefficient=0.01).losses[0]["reduction"] == "sum"


def test_families_that_lack_a_role_get_the_rest():
    with pytest.warns(UserWarning, match="has no site for: lora on 'gate'"):
        model = adapted(small("dynmole", losses=None), "phi")
    assert model(**tiny_batch()).loss.isfinite()


# -------------------------------------------------------------------------------------------------------- composition


def _hydra_inside_moa() -> list[dict[str, Any]]:
    experts = moa_experts(rank=4)
    return [
        entry | {"type": "hydra", "num": 3} if entry.get("target") in ("q", "down") else entry for entry in experts
    ]


COMPOSED = {
    "top-k routing of MoA's experts": lambda: small("soft_moa", router={"type": "top_k", "k": 2}),
    "DynMoLE routing of MoA's experts": lambda: small(
        "soft_moa",
        router={"type": "dynmole", "bias": True, "hidden_per_expert": 2},
        losses=[
            {"type": "entropy", "coefficient": 1e-2},
            {"type": "balance", "coefficient": 1e-3, "load": "weights"},
        ],
    ),
    "sparsegen over MoA's experts": lambda: small(
        "sparse_moa",
        router={"type": "sparsegen", "hidden": 8},
        losses=[{"type": "sparsity", "coefficient": 0.1, "k": 2}],
    ),
    "AdaMoLE's threshold over MoA's experts": lambda: small("sparse_moa", router={"type": "adamole"}),
    "several ranks in one mixture": lambda: MoAConfig(
        experts=[{"type": "lora", "target": "down", "rank": rank} for rank in (2, 4, 8)],
        router={"type": "top_k", "k": 2},
        scope="module",
        task_type="CAUSAL_LM",
    ),
    "HydraLoRA inside MoA": lambda: MoAConfig(experts=_hydra_inside_moa(), task_type="CAUSAL_LM"),
    "cores and LoRA in one block": lambda: MoAConfig(
        experts=[
            {"type": "core", "target": "q", "rank": 4, "num": 3},
            {"type": "lora", "target": "v", "rank": 4},
            {"type": "parallel", "size": 4},
        ],
        router={"type": "softmax"},
        task_type="CAUSAL_LM",
    ),
    "LoRA with weight 1 beside a routed adapter": lambda: MoAConfig(
        experts=[
            {"type": "lora", "target": ["q", "v"], "rank": 4, "routed": False},
            {"type": "parallel", "size": 4, "num": 4},
        ],
        router={"type": "top_k", "k": 1, "renormalise": False},
        scope="module",
        task_type="CAUSAL_LM",
    ),
    "MixLoRA with Switch's routing": lambda: small(
        "mixlora",
        router={"type": "top_k", "k": 1, "renormalise": False, "init_std": 0.02},
        losses=[{"type": "balance", "coefficient": 0.01}, {"type": "z", "coefficient": 0.001}],
    ),
    "MixLoRA with top-p routing": lambda: small("mixlora", router={"type": "top_p", "p": 0.8, "init_std": 0.02}),
    "a list of experts for each half of the blocks": lambda: small(
        "moe_lora_topk", num_experts=[2, 4], balance_coefficient=0.01
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_parts_compose(name: str):
    model = adapted(COMPOSED[name]()).train()
    batch = tiny_batch()
    output = model(**batch)
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients.values())
    for part in (".moa_router.", ".moa_experts."):
        assert any(gradient is not None and gradient.any() for n, gradient in gradients.items() if part in n), part
    with torch.no_grad():
        assert not torch.allclose(output.logits, tiny_model("llama")(**batch).logits, atol=1e-2)


def test_top_k_keeps_two_of_moas_experts():
    model = adapted(COMPOSED["top-k routing of MoA's experts"]()).eval()
    with torch.no_grad(), record_routing(model) as record:
        model(**tiny_batch())
    for routings in record.routings.values():
        weights = routings[-1].weights
        assert weights.shape[-1] == 7 and ((weights > 0).sum(-1) == 2).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small("molora", num_expert=4), "Did you mean 'num_experts'"),
        (lambda: small("molora", num_experts=2.5), "num_experts is 2.5; it must be a whole number, or a list"),
        (lambda: small("mola", num_experts=["2"]), r"num_experts is \['2'\]; it must be a whole number, or a list"),
        (lambda: small("mola", num_experts=[]), "num is"),
        (lambda: small("moe_lora_topk", top_k=0), "router.k is 0"),
        (lambda: small("moe_lora_topk", noise="yes"), "noise is 'yes'; it must be true or false"),
        (lambda: small("dynmole", rank="8"), "rank is '8'; it must be a whole number"),
        (lambda: small("dynmole", top_p=2.0), "router.top_p is 2.0"),
        (lambda: small("dynmole", entropy_coefficient="low"), "entropy_coefficient is 'low'; it must be a number"),
        (lambda: small("molora", targets=[1]), r"targets is \[1\]; it must be a list of names"),
        (lambda: small("prompt", rank=8), "has no knob 'rank'"),
        (lambda: small("lora", layers="x"), "layers is 'x'"),
        (lambda: small("soft_moa", experts=[]), "method: custom"),
        (lambda: small("soft_moa", router={"type": "top_k"}, hidden_per_expert=2), "Give one of the two"),
        (lambda: small("dynmole", losses=[], entropy_coefficient=0.1), "Give one of the two"),
        (lambda: small("soft_moa", router={"type": "topk"}), "Known: .*top_k"),
        (lambda: small("soft_moa", scope="module"), "the prompt expert is no linear layer"),
        (lambda: small("molora", granularity="sequence"), "granularity is 'sequence' and scope 'module'"),
        (lambda: small("molora", router_input="core"), "every routed expert must be of type 'core' or 'hydra'"),
        (lambda: small("comol", scope="block"), "router_input .with scope 'block'. is 'core'"),
        (
            lambda: MoAConfig(experts=[{"type": "hydra", "target": "q", "num": 2, "group": "a"}]),
            "copies have a weight each",
        ),
        (
            lambda: MoAConfig(experts=[{"type": "lora", "target": "q", "routed": False, "group": "a"}]),
            "an expert without a router is in no group",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, words: str):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small("molora", losses=[{"type": "balance", "coefficient": 0.1}]), "selects every expert"),
        (lambda: small("soft_moa", losses=[{"type": "entropy", "coefficient": 0.1}]), "do not add up to 1"),
        (lambda: small("soft_moa", losses=[{"type": "z", "coefficient": 0.1}]), "do not add up to 1"),
        (lambda: small("mola", losses=[{"type": "sparsity", "coefficient": 0.1}]), "predicts no sparsity"),
        (lambda: small("naive_composition", losses=[{"type": "z", "coefficient": 0.1}]), "learns nothing"),
        (lambda: small("mola", balance_coefficient=-1.0), "coefficient is -1"),
        (lambda: small("soft_moa", losses=[{"type": "balanced"}]), "Known: balance"),
    ],
)
def test_losses_that_do_not_fit_the_router_are_refused(make, words: str):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small("moe_lora_topk", top_k=9), "router.k is 9, but a mixture of this model has 8 experts"),
        (lambda: small("mola", top_k=3), "router.k is 3, but a mixture of this model has 2 experts"),
        (lambda: small("dynmole", num_experts=1), "has one expert"),
        (lambda: small("moe_lora_topk", num_experts=2, balance_coefficient=0.1), "selects every expert"),
        (lambda: MoAConfig(experts=[{"type": "lora", "target": "q"}], scope="mlp"), "is not in the MLP"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_changed(make, words: str):
    model = tiny_model("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UserError, match=words):
        get_peft_model(model, make())
    assert {name: type(module) for name, module in model.named_modules()} == before


# ------------------------------------------------------------------------------------------------------- command line


def test_methods_lists_all_of_them(tmp_path, capsys: pytest.CaptureFixture[str]):
    tiny_model("falcon").config.save_pretrained(tmp_path)
    assert main(["methods", "--knobs", "--model", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert all(len(line) <= 100 for line in output.splitlines())
    for method in METHODS.values():
        assert f" {method.name} " in output and method.source.removeprefix("arXiv ") in output
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(small("moe_lora_topk"), "falcon")
    number = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f" {number:,} " in output
    assert "prompt: The prompt expert cannot work in block" in output, "methods that do not fit say why"
    assert "balance_coefficient = 0.01" in output and "targets = ('q', 'k', 'v', 'o', 'down')" in output


def test_count_joins_the_copies_of_an_expert(tmp_path, capsys: pytest.CaptureFixture[str]):
    tiny_model("llama").config.save_pretrained(tmp_path)
    knobs = ["--num_experts", "[2, 4]", "--router", "{type: softmax}"]
    assert main(["count", "--model", str(tmp_path), "--method", "moe_lora_topk", *knobs]) == 0
    output = capsys.readouterr().out
    # The configuration alone is enough.
    assert main(["count", "--model", str(tmp_path / "config.json"), "--method", "moe_lora_topk", *knobs]) == 0
    assert capsys.readouterr().out.partition("┏")[2] == output.partition("┏")[2]
    assert "lora_q, 4 copies" in output and "lora_q_1" not in output
