"""Adapter files that are damaged or belong to another model are refused at every door, before the model is touched."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from moa_peft import MoAConfig, UserError
from moa_peft.adapter_tensors import PREFIX, further_shapes, mixture_shapes
from moa_peft.plan import make_plan
from tests.matrix import CASES, Family, Variant, adapted
from tests.models import LAYERS, tiny_config, tiny_model
from tests.native import CAUSAL, adapter_tensors, footprint, logits, save_base_and_adapter, soft, trained

WEIGHTS = "adapter_model.safetensors"
NAME = "base_model.model.model.layers.1.moa.moa_experts.lora_q.lora_A.weight"

pytestmark = pytest.mark.filterwarnings("ignore:.*has no site for.*:UserWarning")

DOORS: dict[str, Callable[[nn.Module, Path], object]] = {
    "peft": lambda base, folder: PeftModel.from_pretrained(base, folder),
    "peft, to train": lambda base, folder: PeftModel.from_pretrained(base, folder, is_trainable=True),
    "peft, meta": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "peft, config": lambda base, folder: PeftModel.from_pretrained(
        base, folder, config=MoAConfig.from_pretrained(folder)
    ),
    "transformers": lambda base, folder: base.load_adapter(str(folder)),
    "transformers, to train": lambda base, folder: base.load_adapter(str(folder), is_trainable=True),
}
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
both_libraries = pytest.mark.parametrize("door", [DOORS["peft"], DOORS["transformers"]], ids=["peft", "transformers"])


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _absent(file: Path) -> None:
    file.unlink()


def _changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)

    return damage


DAMAGES = {
    "truncated": (_truncated, "truncated or damaged"),
    "empty": (_empty, "truncated or damaged"),
    "absent": (_absent, f"has no {WEIGHTS}"),
    "no tensors": (_changed(lambda tensors: tensors.clear()), "holds no tensor"),
    "NaN": (_changed(lambda tensors: tensors[NAME][0].fill_(float("nan"))), f"{NAME}.* NaN or infinity"),
    "infinity": (_changed(lambda tensors: tensors[NAME][-1, -1].fill_(-float("inf"))), f"{NAME}.* NaN or infinity"),
    "missing": (_changed(lambda tensors: tensors.pop(NAME)), f"{NAME}: not in the file"),
    "unexpected": (
        _changed(lambda tensors: tensors.update({NAME.replace("lora_q", "lora_up"): torch.ones(2)})),
        "lora_up.lora_A.weight: not in this base",
    ),
    "other shape": (
        _changed(lambda tensors: tensors.update({NAME: torch.ones(3, 32)})),
        rf"{NAME}: \(3, 32\) in the file, \(8, 32\) for this base",
    ),
}


@every_door
def test_what_is_refused_and_what_is_loaded_at_every_door(door, tmp_path):
    folder = save_base_and_adapter(tmp_path)
    base = tiny_model("llama")
    before = footprint(base)
    DAMAGES["NaN"][0](folder / WEIGHTS)
    with pytest.raises(UserError, match="NaN or infinity"):
        door(base, folder)
    assert footprint(base) == before
    trained().save_pretrained(folder)
    door(base, folder)
    assert torch.equal(logits(base), logits(trained()))


@both_libraries
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file(door, damage, message, tmp_path):
    folder = save_base_and_adapter(tmp_path)
    damage(folder / WEIGHTS)
    base = tiny_model("llama")
    before, expected = footprint(base), logits(base)
    with pytest.raises(UserError, match=message) as caught:
        door(base, folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) < 10
    assert footprint(base) == before
    assert torch.equal(logits(base), expected)


@both_libraries
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "qwen3_moe"])
def test_an_adapter_of_another_family(door, family, tmp_path):
    folder = save_base_and_adapter(tmp_path, family)
    base = tiny_model("llama")
    before = footprint(base)
    with pytest.raises(UserError, match=f"does not fit this LlamaForCausalLM(.|\n)*trained on '{tmp_path / 'base'}'"):
        door(base, folder)
    assert footprint(base) == before


@both_libraries
def test_an_adapter_of_another_size(door, tmp_path):
    folder = save_base_and_adapter(tmp_path)
    config = tiny_config("llama")
    config.hidden_size, config.num_hidden_layers = 48, LAYERS + 1
    base = AutoModelForCausalLM.from_config(config)
    before = footprint(base)
    with pytest.raises(UserError, match=r"\(8, 32\) in the file, \(8, 48\) for this base(.|\n)*and \d+ more"):
        door(base, folder)
    assert footprint(base) == before


def test_the_auto_classes_refuse_as_well(tmp_path):
    folder = save_base_and_adapter(tmp_path)
    DAMAGES["NaN"][0](folder / WEIGHTS)
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(UserError, match="NaN or infinity"):
            auto.from_pretrained(folder)


@pytest.mark.parametrize("name", ["second", "default"])
def test_a_further_adapter(name, tmp_path):
    """Refused, it leaves the adapters of the model alone, also the one whose weights it was to replace."""
    folder = save_base_and_adapter(tmp_path)
    DAMAGES["NaN"][0](folder / WEIGHTS)
    model = trained(seed=9)
    before, expected = footprint(model), logits(model)
    with pytest.raises(UserError, match="NaN or infinity"):
        model.load_adapter(folder, adapter_name=name)
    assert footprint(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_weights_for_an_adapter_of_another_configuration(tmp_path):
    folder = save_base_and_adapter(tmp_path)
    model = trained(config=soft(rank=4))
    expected = logits(model)
    with pytest.raises(UserError, match=r"\(8, 32\) in the file, \(4, 32\) for this base"):
        model.load_adapter(folder, adapter_name="default")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("prefixed", [True, False])
def test_tensors_given_to_transformers(prefixed, tmp_path):
    folder = save_base_and_adapter(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors = tensors if prefixed else {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    base = tiny_model("llama")
    base.load_adapter(peft_config=soft(inference_mode=True), adapter_state_dict=dict(tensors))
    assert torch.equal(logits(base), logits(trained()))
    tensors.pop(min(tensors))
    base = tiny_model("llama")
    before = footprint(base)
    with pytest.raises(UserError, match="not in the file"):
        base.load_adapter(peft_config=soft(inference_mode=True), adapter_state_dict=tensors)
    assert footprint(base) == before


def test_ignoring_sizes_is_still_possible(tmp_path):
    """As with LoRA: tensors of other shapes keep their initial values, the others are loaded."""
    folder = save_base_and_adapter(tmp_path)
    DAMAGES["other shape"][0](folder / WEIGHTS)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        model = PeftModel.from_pretrained(tiny_model("llama"), folder, ignore_mismatched_sizes=True)
    loaded, expected = adapter_tensors(model), adapter_tensors(trained())
    assert [name for name in loaded if not torch.equal(loaded[name], expected[name])] == [
        NAME.replace("moa_experts", "moa_experts.default")
    ]


def test_weights_saved_by_torch(tmp_path):
    folder = tmp_path / "adapter"
    trained().save_pretrained(folder, safe_serialization=False)
    file = folder / "adapter_model.bin"
    assert file.is_file()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), folder)), logits(trained()))
    _truncated(file)
    base = tiny_model("llama")
    before = footprint(base)
    with pytest.raises(UserError, match="truncated or damaged"):
        PeftModel.from_pretrained(base, folder)
    assert footprint(base) == before


def test_an_adapter_in_a_subfolder(tmp_path):
    folder = save_base_and_adapter(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, subfolder="adapter")
    assert torch.equal(logits(model), logits(trained()))
    DAMAGES["missing"][0](folder / WEIGHTS)
    with pytest.raises(UserError, match="not in the file"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path, subfolder="adapter")


@pytest.mark.parametrize(
    "knobs",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5, 8]}],
    ids=lambda knobs: next(iter(knobs)),
)
@both_libraries
def test_further_trained_tensors_belong_to_the_file(door, knobs, tmp_path):
    folder = save_base_and_adapter(tmp_path, config=soft(**knobs))
    door(tiny_model("llama"), folder)
    tensors = load_file(folder / WEIGHTS)
    (further,) = [name for name in tensors if ".moa." not in name]
    tensors.pop(further)
    save_file(tensors, folder / WEIGHTS)
    base = tiny_model("llama")
    before = footprint(base)
    with pytest.raises(UserError, match=f"{further}: not in the file"):
        door(base, folder)
    assert footprint(base) == before


def test_resized_embeddings_belong_to_the_file(tmp_path):
    base = tiny_model("llama")
    base.resize_token_embeddings(104)
    model = get_peft_model(base, soft())
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(name.endswith("embed_tokens.weight") for name in load_file(tmp_path / WEIGHTS))
    other = tiny_model("llama", seed=1)
    before = footprint(other)
    with pytest.raises(UserError, match=r"embed_tokens.weight: \(104, 32\) in the file, \(96, 32\) for this base"):
        PeftModel.from_pretrained(other, tmp_path)
    assert footprint(other) == before
    other.resize_token_embeddings(104)
    again = PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_other_methods_are_left_to_peft(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **CAUSAL)
    get_peft_model(tiny_model("llama"), lora).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    removed = min(tensors)
    tensors.pop(removed)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


def test_a_folder_without_an_adapter_is_left_to_peft(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "absent")


@pytest.mark.parametrize(
    ("variant", "family"),
    [case for case in CASES if case[0].name == "soft" or case[1].name == "llama"],
    ids=lambda value: value.name,
)
def test_what_is_expected_is_what_is_saved(variant: Variant, family: Family):
    model = adapted(variant, family, trained=False)
    saved = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    base, config = tiny_model(family.name), variant.config()
    hidden_size = base.config.get_text_config().hidden_size
    expected = mixture_shapes(config, make_plan(config, base), hidden_size) | further_shapes(config, base)
    assert {PREFIX + name: shape for name, shape in expected.items()} == saved
