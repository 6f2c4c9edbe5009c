"""What goes wrong only when methods meet models: fused layers, other dtypes, hooks, loaders, dropout."""

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moa_peft import MoAConfig, moa_status, plain_path, record_routing
from moa_peft.architectures import ROLES
from moa_peft.auxiliary import read_losses
from moa_peft.errors import UserError
from moa_peft.layer import MoALayer
from moa_peft.methods import METHODS
from tests.matrix import FAMILIES, VARIANTS, adapted, randomise_adapter
from tests.models import tiny_batch, tiny_model
from tests.native import CAUSAL, gradients

LLAMA = next(family for family in FAMILIES if family.name == "llama")
TARGETS = ["q", "k", "v", "o", "down"]
PRESETS = [variant for variant in VARIANTS if variant.name in METHODS]


def preset(name: str, family: str = "llama", **knobs: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(family), MoAConfig.preset(name, **knobs, **CAUSAL))
    randomise_adapter(model)
    return model


def step(model: Any, **batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = model(**(batch or tiny_batch(rows=3, tokens=8)))
    output.loss.backward()
    return output.logits.detach(), gradients(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
@pytest.mark.parametrize("variant", PRESETS, ids=lambda variant: variant.name)
def test_presets_in_bfloat16(variant: Any, dtype: torch.dtype):
    """Products in bfloat16; the few routings that rounding turns over may differ."""
    model = adapted(variant, LLAMA, dtype=dtype).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        values, fused = step(model)
        with plain_path(model):
            expected, plain = step(model)
        model.eval()
        with torch.no_grad():
            model(**tiny_batch())
    assert all(torch.isfinite(gradient).all() for gradient in fused.values())
    flat, reference = (torch.cat([found[n].flatten() for n in plain]) for found in (fused, plain))
    for one, other in ((values.float().flatten(), expected.float().flatten()), (flat, reference)):
        assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.98


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "hydra", "core"])
def test_roles_of_one_fused_layer_are_one_expert(family: str, kind: str):
    experts = [{"type": kind, "target": TARGETS, "num": 2, "rank": 4}]
    config = MoAConfig(experts=experts, scope="module", router={"type": "softmax"}, **CAUSAL)
    model = get_peft_model(tiny_model(family), config)
    layers = [module for module in model.modules() if isinstance(module, MoALayer)]
    for layer in layers:
        assert {mixture.num_columns for mixture in layer.mixtures["default"].mixtures.values()} == {2}


def test_two_entries_for_roles_of_one_fused_layer():
    experts = [{"type": "lora", "target": ["q", "v"], "num": 2}, {"type": "lora", "target": ["k"], "num": 2}]
    model = get_peft_model(tiny_model("phi3"), MoAConfig(experts=experts, **CAUSAL))
    layer = next(module for module in model.modules() if isinstance(module, MoALayer))
    assert layer.mixtures["default"].mixtures["block"].num_columns == 2


def lora_modules(model: Any) -> set[str]:
    names = (name for name, _ in model.get_base_model().named_modules())
    return {name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")}


@pytest.mark.parametrize("targets", [TARGETS, list(ROLES)], ids=["default", "all"])
@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_lora_adapts_what_the_mixtures_adapt(family: str, targets: list[str]):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no site for")
        mixed = get_peft_model(tiny_model(family), MoAConfig.preset("hydralora", targets=targets, rank=2, **CAUSAL))
    layers = [(n, m) for n, m in mixed.get_base_model().named_modules() if isinstance(m, MoALayer)]
    expected = {
        f"{name.removesuffix('.moa')}.{slot.modules[0]}"
        for name, layer in layers
        for slot in layer.mixtures["default"].slots
    }
    assert len(layers) == 2 and len(expected) >= 2 * 3
    for blocks in (None, "1"):
        config = MoAConfig.preset("lora", targets=targets, rank=2, layers=blocks, **CAUSAL)
        wanted = {name for name in expected if blocks is None or f".{blocks}." in name}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="You have passed exclude_modules")
            found = lora_modules(get_peft_model(tiny_model(family), config))
        if family == "qwen3_moe":
            # PEFT takes the names of a dense MLP for those of the experts of all blocks, and adapts these instead.
            assert "model.layers.0.mlp.experts" in found
            found, wanted = ({name for name in names if ".mlp." not in name} for names in (found, wanted))
        assert found == wanted


def test_lora_takes_roles_and_modules():
    model = get_peft_model(tiny_model("gpt2"), MoAConfig.preset("lora", targets=["o", "c_fc"], **CAUSAL))
    parts = ("attn.c_proj", "mlp.c_fc")
    assert lora_modules(model) == {f"transformer.h.{block}.{part}" for block in range(2) for part in parts}


def _copy(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    return (args[0] * 1.0,)


@pytest.mark.parametrize("name", ["moe_lora_topk", "comol"])
def test_sites_that_read_other_tensors_than_their_neighbours(name: str):
    """Each routes once, from what it reads, and each loss counts once."""
    losses = {"losses": [{"type": "importance", "coefficient": 1.0}]}
    model = preset(name, dropout=0.0, rank=4, alpha=4.0, **losses).train()
    for block in model.base_model.model.model.layers:
        block.self_attn.k_proj.register_forward_pre_hook(_copy)
    values, fused = step(model)
    read_losses(model)
    with plain_path(model):
        expected, plain = step(model)
    torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(fused, plain, atol=2e-5, rtol=1e-3)
    with torch.no_grad(), record_routing(model) as record:
        model(**tiny_batch())
    assert {len(routings) for routings in record.routings.values()} == {1}


def test_a_hook_on_a_router_at_a_linear_layer_is_called():
    model = preset("molora", rank=4)
    seen: list[str] = []
    layer = model.base_model.model.model.layers[0].moa
    for role in ("q", "down"):
        layer.moa_router["default"][role].register_forward_hook(lambda *args, role=role: seen.append(role))
    step(model.train())
    assert seen == ["q", "down"]
    # k and v share the product of q, and go its way.
    plain = {part.part for part in moa_status(model).parts if part.obstacle and part.block.endswith("layers.0")}
    assert {"router q", "router down"} <= plain


@pytest.mark.parametrize("name", ["ld_mole", "dynmole", "mixlora", "comol"])
def test_loading_with_little_memory(name: str, tmp_path):
    model = preset(name, rank=4).eval()
    batch = {"input_ids": tiny_batch()["input_ids"]}
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, low_cpu_mem_usage=True)
    # Weights at other addresses are multiplied in another order.
    torch.testing.assert_close(again(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    again.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    again.set_adapter("second")
    torch.testing.assert_close(again(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_adapters_named_like_a_width_are_refused():
    model = get_peft_model(tiny_model("llama"), MoAConfig.preset("ld_mole", **CAUSAL))
    width = str(model.config.hidden_size)
    with pytest.raises(UserError, match="part of the names"):
        model.add_adapter(width, MoAConfig.preset("ld_mole", **CAUSAL))


def test_blocks_on_several_devices_share_no_network():
    base = tiny_model("llama")
    base.model.layers[1].to("meta")
    with pytest.raises(UserError, match="several devices"):
        get_peft_model(base, MoAConfig.preset("ld_mole", **CAUSAL))
    assert not any("moa" in name for name, _ in base.named_modules())


def test_shared_networks_are_one_for_each_width_and_leave_with_the_adapter(tmp_path):
    model = preset("ld_mole", rank=4)
    config = model.config
    names = {name for name, _ in model.named_parameters() if "moa_shared" in name}
    widths = {name.split(".moa_shared.default.")[1].split(".")[0] for name in names}
    o_width = config.num_attention_heads * config.head_dim
    assert widths == {str(size) for size in (config.hidden_size, o_width, config.intermediate_size)}
    assert len(names) == 4 * len(widths)
    model.add_adapter("other", MoAConfig.preset("ld_mole", rank=4, **CAUSAL))
    assert any("moa_shared.other" in name for name, _ in model.named_parameters())
    model.delete_adapter("other")
    assert not any("moa_shared.other" in name for name, _ in model.named_parameters())
    base = model.unload()
    assert not any("moa" in name for name, _ in base.named_modules())


@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral"])
def test_mixlora_needs_a_gated_mlp(family: str):
    base = tiny_model(family)
    with pytest.raises(UserError, match="gate, up, activation and down"):
        get_peft_model(base, MoAConfig.preset("mixlora", **CAUSAL))
    assert not any("moa" in name for name, _ in base.named_modules())


def test_mixlora_is_the_mixture_of_whole_mlps():
    """MixLoRA: y = sum_e w_e F_e(x), with weights that sum to 1."""
    model = preset("mixlora", rank=4, alpha=8.0, dropout=0.0).eval()
    block = model.base_model.model.model.layers[0]
    x = torch.randn(2, 5, model.config.hidden_size)
    seen: dict[str, torch.Tensor] = {}
    block.mlp.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    with torch.no_grad(), record_routing(model) as record:
        model(inputs_embeds=x)
        weights = record.routings["model.layers.0.mlp" if "model.layers.0.mlp" in record.routings else _first(record)]
        expert = block.moa.moa_experts["default"]["mlp_lora"]
        expected = torch.zeros_like(seen["y"])
        mlp, scale = block.mlp, expert.options.scale
        with model.disable_adapter():
            gate, up = mlp.gate_proj(seen["x"]), mlp.up_proj(seen["x"])
            for number in range(8):
                h = mlp.act_fn(gate + scale * expert.gate[number](seen["x"]))
                h = h * (up + scale * expert.up[number](seen["x"]))
                one = mlp.down_proj(h) + scale * expert.down[number](h)
                expected += weights[0].weights[..., number : number + 1] * one
    torch.testing.assert_close(seen["y"], expected, atol=2e-5, rtol=1e-4)


def _first(record: Any) -> str:
    return next(name for name in record.routings if ".layers.0." in f"{name}." and name.endswith("mlp"))


def test_experts_of_an_mlp_without_a_router():
    config = MoAConfig(
        experts=[{"type": "mlp_lora", "rank": 4, "num": 2, "routed": False}, {"type": "lora", "target": "q"}],
        **CAUSAL,
    )
    model = get_peft_model(tiny_model("llama"), config)
    randomise_adapter(model)
    values, fused = step(model)
    with plain_path(model):
        expected, plain = step(model)
    torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(fused, plain, atol=2e-5, rtol=1e-3)


_SHARED_A = {"type": "hydra", "target": "q", "rank": 4, "num": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"experts": [{"type": "mlp_lora"}], "scope": "module", "router_input": "core"},
            "must be of type 'core' or 'hydra'",
        ),
        (
            {
                "experts": [{"type": "lora", "target": "down", "num": 2}],
                "scope": "mlp",
                "architecture": {
                    "blocks": "layers",
                    "attention": "self_attn",
                    "roles": {"down": "mlp.down_proj"},
                    "norm": "input_layernorm",
                },
            },
            "no MLP module",
        ),
        ({"experts": [{"type": "lora", "target": "q", "num": 2}], "scope": "mlp"}, "is not in the MLP"),
        *(
            (
                {"experts": [_SHARED_A, other], "scope": "module", "router_input": "core"},
                r"layers\.0\.q has 2 experts with an A of their own",
            )
            for other in (_SHARED_A | {"rank": 2}, _SHARED_A | {"type": "core"})
        ),
    ],
)
def test_senseless_combinations_leave_the_model_as_it_was(config: dict[str, Any], message: str):
    base = tiny_model("llama")
    with pytest.raises(UserError, match=message):
        get_peft_model(base, MoAConfig(router={"type": "softmax"}, **config, **CAUSAL))
    assert not any("moa" in name for name, _ in base.named_modules())


@pytest.mark.parametrize("name", ["molora", "hydralora", "comol", "ld_mole"])
def test_dropout(name: str):
    """In training other elements are dropped under every seed, and in evaluation none."""
    model = preset(name, rank=4, dropout=0.3)
    batch = {"input_ids": tiny_batch()["input_ids"]}

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(**batch).logits

    model.train()
    for path in ("fused", "plain"):
        model.base_model.model.model.layers[0].moa.fused_path.enabled = path == "fused"
        assert torch.equal(logits(1), logits(1))
        assert not torch.allclose(logits(1), logits(2), atol=1e-4)
    model.eval()
    assert torch.equal(logits(1), logits(2))


@pytest.mark.parametrize("name", ["molora", "ld_mole"])
def test_routers_see_what_is_not_dropped(name: str):
    model = preset(name, rank=4, dropout=0.5).train()
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad(), record_routing(model) as record:
            model(input_ids=tiny_batch()["input_ids"])
        weights.append(record.routings[next(iter(record.routings))][0].weights)
    assert torch.equal(*weights)


def test_init_from_takes_every_lora_layer_or_refuses(tmp_path):
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "k_proj"], **CAUSAL))
    lora.save_pretrained(tmp_path)
    experts = [{"type": "lora", "target": "q", "rank": 4}, {"type": "hydra", "target": "k", "rank": 4, "num": 2}]
    with pytest.raises(UserError, match="without a LoRA expert"):
        get_peft_model(tiny_model("llama"), MoAConfig(experts=experts, init_from=str(tmp_path), **CAUSAL))


def test_an_mlp_that_is_called_by_keyword_keeps_its_experts():
    model = preset("mixlora", rank=4).eval()
    block = model.base_model.model.model.layers[0]
    layer = block.moa
    x = torch.randn(1, 3, model.config.hidden_size)
    outputs = []
    for call in (lambda: block.mlp(x), lambda: block.mlp(x=x)):
        layer.start(x, None, pooling=None, tokens=None)
        outputs.append(call())
        layer.finish()
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], type(block.mlp).__mro__[1].forward(block.mlp, x))
