"""Soft and Sparse MoA against the outputs of the released reference implementation."""

from pathlib import Path

import pytest
import torch

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


def test_files_that_cannot_be_compared_say_so(tmp_path, capsys):
    assert parity.main([str(tmp_path / "none.safetensors")]) == 1
    assert "no such file" in capsys.readouterr().out
