"""Sequence classification on decoders: task_type SEQ_CLS, with the score head trained and saved beside the adapter."""

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from moa_peft import MoAConfig
from tests.matrix import randomise_adapter
from tests.models import randomise, tiny_batch, tiny_config

CONFIGS = {"soft": MoAConfig.soft, "sparse": MoAConfig.sparse}
by_family = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
by_config = pytest.mark.parametrize("kind", CONFIGS)


def classifier(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(family)
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config)
    randomise(model, std=0.15)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    values = tiny_batch(rows=4, tokens=7) | {"labels": torch.tensor([0, 2, 1, 0])}
    values["attention_mask"][1, 5:] = 0
    values["input_ids"][1, 5:] = 0
    return values


def scores(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


@by_family
@by_config
def test_it_starts_as_the_base_model(family, kind):
    model = get_peft_model(classifier(family), CONFIGS[kind](task_type="SEQ_CLS")).eval()
    assert torch.equal(scores(model), scores(classifier(family)))


@by_family
@by_config
def test_training_saving_and_loading(family, kind, tmp_path):
    classifier(family).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, CONFIGS[kind](task_type="SEQ_CLS"))
    randomise_adapter(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(8):
        loss = model.train()(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in moved if ".moa." not in name} == {"base_model.model.score.modules_to_save.default.weight"}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    with torch.no_grad():
        assert model(**batch()).loss < loss
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert [name for name in saved if ".moa." not in name] == ["base_model.model.score.weight"]
    again = PeftModel.from_pretrained(classifier(family), tmp_path / "adapter")
    assert torch.equal(scores(again), scores(model))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(scores(loaded), scores(model))


@by_config
def test_padding_on_the_right_changes_no_score(kind):
    model = get_peft_model(classifier("llama"), CONFIGS[kind](task_type="SEQ_CLS")).eval()
    randomise_adapter(model)
    row = {"input_ids": batch()["input_ids"][1:2, :5], "attention_mask": batch()["attention_mask"][1:2, :5]}
    with torch.no_grad():
        alone = model(**row).logits
    torch.testing.assert_close(scores(model)[1:2], alone, atol=1e-5, rtol=1e-4)
