"""What a mixture cannot do is refused with a reason, before anything is changed."""

import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from moa_peft import MoAConfig, UserError, __version__
from moa_peft.config import MOA_FORMAT
from tests.models import tiny_batch, tiny_model
from tests.native import footprint, logits, save_base_and_adapter, soft, trained

MERGE = "cannot be merged.*weights depend on the token"
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def test_merging():
    model = trained()
    before, expected = footprint(model), logits(model)
    for merge in (
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True),
        lambda: model.merge_adapter(),
        lambda: model.base_model.merge_adapter(["default"]),
        lambda: model.base_model.model.model.layers[0].moa.merge(),
    ):
        with pytest.raises(NotImplementedError, match=MERGE):
            merge()
    assert footprint(model) == before
    assert torch.equal(logits(model), expected)


def test_weighted_adapters():
    model = trained()
    model.add_adapter("second", soft())
    before = footprint(model)
    with pytest.raises((NotImplementedError, UserError), match="depend on the token"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    assert footprint(model) == before
    assert list(model.peft_config) == ["default", "second"]


def test_conversion_to_lora():
    assert not trained().supports_lora_conversion()


def test_hotswap(tmp_path):
    folder = save_base_and_adapter(tmp_path)
    model = trained(seed=9)
    expected = logits(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, str(folder), adapter_name="default")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_adapters_mixed_in_one_batch(call):
    model = trained()
    model.add_adapter("second", soft())
    batch = {key: value for key, value in tiny_batch(rows=2).items() if key != "labels"}
    run = model if call == "forward" else model.generate
    with pytest.raises(UserError, match="adapter_names"):
        run(**batch, adapter_names=["default", "second"])


@pytest.mark.parametrize("size", [1, 2])
def test_tensor_parallel(size):
    model = tiny_model("llama")
    # What transformers records on a model that it has sharded; 1 stands for a mesh without tensor parallelism.
    model._tp_size = size
    before = footprint(model)
    if size == 1:
        get_peft_model(model, soft())
        return
    with pytest.raises(UserError, match="tensor parallelism"):
        get_peft_model(model, soft())
    assert footprint(model) == before


def test_stacking_on_lora():
    lora = get_peft_model(tiny_model("llama"), LoraConfig(**LORA))
    before = footprint(lora)
    for attempt in (
        lambda: lora.add_adapter("second", soft()),
        lambda: get_peft_model(lora, soft()),
        lambda: get_peft_model(lora.base_model.model, soft()),
        lambda: inject_adapter_in_model(soft(), lora),
    ):
        with pytest.raises(ValueError, match="different peft types|already carries another PEFT method"):
            attempt()
        assert footprint(lora) == before
    assert list(lora.peft_config) == ["default"]


def test_lora_on_top_of_a_mixture():
    model = trained()
    before, expected = footprint(model), logits(model)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("second", LoraConfig(**LORA))
    assert footprint(model) == before
    assert torch.equal(logits(model), expected)


def test_a_file_of_a_newer_format(tmp_path):
    folder = save_base_and_adapter(tmp_path)
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text()) | {
        "moa_format": MOA_FORMAT + 1,
        "moa_version": "9.8.7",
        "an_option_of_the_future": True,
        "router": {"type": "a_router_of_the_future"},
    }
    file.write_text(json.dumps(content))
    base = tiny_model("llama")
    before = footprint(base)
    message = rf"written by moa-peft 9\.8\.7 in format {MOA_FORMAT + 1}; this is moa-peft {__version__}.*Upgrade"
    for load in (
        lambda: PeftConfig.from_pretrained(folder),
        lambda: MoAConfig.from_pretrained(folder),
        lambda: PeftModel.from_pretrained(base, folder),
        lambda: base.load_adapter(str(folder)),
    ):
        with pytest.raises(UserError, match=message):
            load()
    assert footprint(base) == before


@pytest.mark.parametrize("value", [0, "1", None])
def test_a_format_that_is_none(value):
    with pytest.raises(UserError, match="moa_format"):
        MoAConfig(moa_format=value)


def test_a_failed_second_adapter_leaves_the_first_alone():
    model = trained()
    before, expected = footprint(model), logits(model)
    with pytest.raises(UserError, match="has no site"):
        model.add_adapter("second", MoAConfig(experts=[{"type": "lora", "target": "nowhere"}], task_type="CAUSAL_LM"))
    assert footprint(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_a_module_without_a_configuration():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    before = footprint(model)
    with pytest.raises(UserError, match="'Sequential' is not known. Known families: llama"):
        get_peft_model(model, MoAConfig.soft())
    assert footprint(model) == before
