"""Soft and Sparse MoA against the outputs of the released reference implementation, and the command that does it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import parity

DATA = Path(__file__).parent / "parity_data"
# llama_*, qwen3_*: outputs of the released reference. independent_*: outputs of a separate implementation in plain
# torch, written from the equations alone, for settings the former do not cover (linear router, residual input,
# constant threshold, other ranks and orders, tied embeddings).
FILES = sorted(DATA.glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_quantity_is_within_its_tolerance(path):
    rows = parity.compare(path)
    assert {row.quantity for row in rows} >= {"logits", "loss", "gradients", "routing weights", "generated_batch"}
    exceeded = [row for row in rows if row.of_tolerance > 1]
    assert not exceeded


def test_the_comparison_can_fail(monkeypatch):
    """A change of one expert's scale by one percent is seen."""
    original = parity.build

    def slightly_off(metadata, tensors):
        model = original(metadata, tensors)
        with torch.no_grad():
            model.get_base_model().model.layers[1].moa.moa_experts["default"]["lora_v"].lora_B.weight.mul_(1.01)
        return model

    monkeypatch.setattr(parity, "build", slightly_off)
    rows = {row.quantity: row for row in parity.compare(DATA / "llama_soft.safetensors")}
    assert rows["logits"].of_tolerance > 1


def test_files_are_there():
    assert len(FILES) == 10


LAYER = DATA / "single_layers" / "adamole.safetensors"


def test_one_command_compares_files_of_both_kinds(capsys):
    assert parity.main([str(DATA / "llama_sparse.safetensors"), str(LAYER)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("logits", "generated_batch", "y, fused", "gradients, plain", "balance loss"))


def test_a_file_that_fails_does_not_hide_the_others(tmp_path, capsys):
    wrong, damaged = tmp_path / "wrong.safetensors", tmp_path / "damaged.safetensors"
    metadata, tensors = parity.load(LAYER)
    save_file(dict(tensors) | {"y": tensors["y"] + 0.01}, str(wrong), metadata=dict(metadata))
    damaged.write_bytes(LAYER.read_bytes()[:5000])
    assert parity.main([str(tmp_path / "none.safetensors"), str(damaged), str(wrong), str(LAYER)]) == 1
    shown = capsys.readouterr().out
    assert "none.safetensors: there is no such file" in shown
    assert "damaged.safetensors: no safetensors file, or a damaged one" in shown
    assert shown.count("y, fused") == 2


@pytest.mark.parametrize(
    ("metadata", "without", "message"),
    [
        ({}, "logits", "it holds no 'logits'"),
        ({}, "base.model.norm.weight", "the base weights do not fit: missing .*model.norm.weight"),
        ({}, "adapter.layers.1.threshold.bias", "it does not hold every tensor of the adapter"),
        ({"config": '{"hidden_size": 64, "num_attention_heads": 4}'}, "", "the base weights do not fit: .*size"),
        ({"variant": None}, "", "it holds no 'variant'"),
    ],
)
def test_a_damaged_whole_model_says_so(metadata, without, message, tmp_path):
    said, tensors = parity.load(DATA / "llama_sparse.safetensors")
    said = {key: value for key, value in (said | metadata).items() if value is not None}
    tensors.pop(without, None)
    save_file(dict(tensors), str(tmp_path / "file.safetensors"), metadata=said)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        parity.compare(tmp_path / "file.safetensors")
