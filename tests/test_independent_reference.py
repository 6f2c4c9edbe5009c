"""The files of the second implementation are what its program computes today."""

import ast
from pathlib import Path

import pytest
import torch

from tests import independent_reference, parity

DATA = Path(__file__).parent / "parity_data"
# As wide as those with which the package is compared.
TOLERANCES = {"grad": {"atol": 5e-5, "rtol": 1e-3}, "logits": {"atol": 5e-5, "rtol": 0.0}}


@pytest.mark.parametrize("case", independent_reference.CASES, ids=lambda case: case.name)
def test_the_stored_file_is_reproduced(case: independent_reference.Case):
    stored_metadata, stored = parity.load(DATA / f"independent_{case.name}.safetensors")
    metadata, tensors = independent_reference.compute(case)
    assert metadata == stored_metadata
    assert tensors.keys() == stored.keys()
    for name, tensor in tensors.items():
        tolerance = TOLERANCES.get(name.partition(".")[0], {"atol": 5e-6, "rtol": 0.0})
        torch.testing.assert_close(tensor, stored[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_every_stored_file_has_its_case():
    names = {path.stem.removeprefix("independent_") for path in DATA.glob("independent_*")}
    assert names == {case.name for case in independent_reference.CASES}


def test_the_files_are_written(tmp_path, monkeypatch, capsys):
    case = independent_reference.CASES[0]
    monkeypatch.setattr(independent_reference, "CASES", (case,))
    assert independent_reference.main([str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / f"independent_{case.name}.safetensors"
    assert str(file) in capsys.readouterr().out
    assert max(row.of_tolerance for row in parity.compare(file)) <= 1
    assert independent_reference.main([]) == 2


def test_sparse_cases_leave_experts_out():
    for case in independent_reference.CASES:
        _, stored = parity.load(DATA / f"independent_{case.name}.safetensors")
        dropped = (stored["routing_weights"] == 0).float().mean()
        assert 0.1 < dropped < 0.9 if case.variant == "sparse" else dropped == 0


def test_the_second_implementation_knows_nothing_of_the_first():
    tree = ast.parse(Path(independent_reference.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} == {
        "dataclasses",
        "json",
        "math",
        "pathlib",
        "safetensors",
        "sys",
        "torch",
    }
