"""The files of an adapter, its configuration and its model card; and the configuration as a Python object."""

import copy
import json
import pickle

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftType, TaskType, get_peft_model

from moa_peft import MoAConfig, UserError, __version__
from moa_peft.config import MOA_FORMAT
from moa_peft.model_card import update_model_card
from tests.matrix import VARIANTS, Variant
from tests.models import tiny_model
from tests.native import CAUSAL, adapter_tensors, logits, save_base_and_adapter, soft, sparse, trained

by_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


@by_variant
def test_configuration_survives_a_file(variant: Variant, tmp_path):
    config = variant.config()
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is MoAConfig
    assert again.to_dict() == config.to_dict()
    assert again == config


@by_variant
def test_configuration_survives_json_pickling_and_copying(variant: Variant):
    config = variant.config()
    through_json = MoAConfig(**json.loads(json.dumps(config.to_dict())))
    assert through_json == config
    assert through_json.peft_type is PeftType.MOA
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert twin == config
        assert twin.peft_type is PeftType.MOA
        assert twin.experts is not config.experts
        twin.experts[0]["layers"] = [0]
        assert twin != config


def test_configuration_given_with_sets_can_be_saved(tmp_path):
    config = MoAConfig(
        target_modules={"q", "v"}, exclude_modules={"layers.1", "layers.0"}, task_type=TaskType.CAUSAL_LM
    )
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["target_modules"] == ["q", "v"]
    assert content["exclude_modules"] == ["layers.0", "layers.1"]
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_what_the_file_says(tmp_path):
    folder = save_base_and_adapter(tmp_path, config=sparse(rank=3))
    content = json.loads((folder / "adapter_config.json").read_text())
    assert content["peft_type"] == "MOA"
    assert content["moa_format"] == MOA_FORMAT
    assert content["moa_version"] == __version__
    assert content["inference_mode"] is True
    assert content["base_model_name_or_path"] == str(tmp_path / "base")
    assert [entry["target"] for entry in content["experts"][:-1]] == ["q", "k", "v", "o", "down"]
    assert content["experts"][0]["rank"] == 3
    assert content["router"]["threshold"] == "learned"


def test_options_that_a_file_lacks_take_their_defaults(tmp_path):
    """A file written before an option existed."""
    soft().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    for key in ("router_input", "granularity", "init", "exclude_modules", "ensure_weight_tying"):
        del content[key]
    for entry in content["experts"]:
        del entry["optional"]
    file.write_text(json.dumps(content))
    again = PeftConfig.from_pretrained(tmp_path)
    assert (again.router_input, again.granularity, again.init) == ("normed", "token", "identity")


def test_the_type_is_the_only_one_of_its_name():
    assert PeftType("MOA") is PeftType.MOA is PeftType["MOA"]
    assert PeftType.MOA.value == "MOA" and PeftType.MOA == "MOA"
    assert [t for t in PeftType if t.value == "MOA"] == [PeftType.MOA]
    assert pickle.loads(pickle.dumps(PeftType.MOA)) is PeftType.MOA


def test_model_card(tmp_path):
    folder = save_base_and_adapter(tmp_path, config=sparse(rank=3, adapter_size=4))
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == str(tmp_path / "base")
    assert "moa-peft" in card.data.tags
    text = card.text
    assert "import moa_peft  # before loading" in text
    assert f'from_pretrained("{tmp_path / "base"}")' in text
    assert "| lora | num 1, target q, rank 3, dropout 0.0, rslora False |" in text
    assert "| parallel | num 1, size 4 |" in text
    assert "| router: sigmoid | hidden_per_expert 4, threshold learned, max_threshold 0.5" in text
    assert "Scope block, granularity token, router input normed." in text
    tensors = adapter_tensors(trained(config=sparse(rank=3, adapter_size=4)))
    router = sum(t.numel() for name, t in tensors.items() if ".moa_router." in name)
    q = sum(t.numel() for name, t in tensors.items() if ".lora_q." in name)
    assert f"| router | {router:,} |" in text
    assert f"| lora_q | {q:,} |" in text
    assert f"| **total** | **{sum(t.numel() for t in tensors.values()):,}** |" in text


def test_model_card_is_updated_in_place(tmp_path):
    folder = save_base_and_adapter(tmp_path)
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\n## Our own words\n\nKept.\n")
    trained(config=soft(rank=2)).save_pretrained(folder)
    update_model_card(folder, soft(rank=2))
    text = readme.read_text()
    assert text.count("## Mixture of adapters") == 1
    assert "rank 2" in text and "rank 8" not in text
    assert "## Our own words\n\nKept." in text


def test_saving_under_another_configuration_object(tmp_path):
    """The configuration that trained and the one in the file describe the same function."""
    config = soft()
    model = get_peft_model(tiny_model("llama"), config)
    assert model.peft_config["default"] is config
    model.save_pretrained(tmp_path)
    assert config.inference_mode is False
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert (loaded.experts, loaded.router) == (config.experts, config.router)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": []}, "experts is"),
        ({"experts": ["lora"]}, r"experts\[0\] is 'lora'"),
        ({"experts": [{"type": "lorra"}]}, "Unknown expert type 'lorra'. Known: core, hydra, lora"),
        ({"experts": [{"type": "lora", "target": "q", "rnak": 2}]}, "unknown option 'rnak'. Did you mean 'rank'"),
        ({"experts": [{"type": "lora"}]}, "option 'target' is required"),
        ({"experts": [{"type": "lora", "target": "q", "rank": 0}]}, r"experts\[0\] \(lora\): rank is 0"),
        ({"router": {"type": "sigmoidd"}}, "Unknown router type 'sigmoidd'. Known: .*sigmoid"),
        ({"router": {"threshold": "learned"}}, "it needs a 'type'"),
        ({"granularity": "word"}, "granularity is 'word'; allowed: 'token', 'sequence'"),
        ({"init": "zeros"}, "init is 'zeros'; allowed"),
        ({"target_modules": ["q"], "experts": [{"type": "prompt"}]}, "target_modules.*and experts are both given"),
    ],
)
def test_a_wrong_configuration_names_the_setting(options, message):
    with pytest.raises(UserError, match=message):
        MoAConfig(**options, **CAUSAL)


def test_a_pickled_model_computes_the_same(tmp_path):
    model = trained()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), logits(model))
