"""Budgets of a study: what must be equal, and how a mismatch is told."""

from itertools import product

import pytest

from moa_peft.errors import UserError
from moa_peft.study.budgets import check_budgets
from moa_peft.study.records import RunRecord

PARAMETERS = {"lora": 1_000_000, "lora_matched": 2_040_000, "soft_moa": 2_000_000}


def make_run(row, seed=1, data="MetaMath", **fields):
    return RunRecord(
        **{
            "row": row,
            "data": data,
            "seed": seed,
            "method": row,
            "learning_rate": 1e-3,
            "steps": 300,
            "tokens": 90_000 + seed,
            "rows_seen": 2_400,
            "trainable_parameters": PARAMETERS[row],
            "peak_memory_bytes": None,
            "step_seconds": None,
            "validation_loss": None,
            "scores": (),
            **fields,
        }
    )


def study(*changes):
    """Three rows, two seeds, two data sets; `changes` are (row, seed, data, fields)."""
    changed = {(row, seed, data): fields for row, seed, data, fields in changes}
    return [
        make_run(row, seed, data, **changed.get((row, seed, data), {}))
        for data, row, seed in product(("MetaMath", "Alpaca"), PARAMETERS, (1, 2))
    ]


def check(records, **settings):
    return check_budgets(records, **{"matched": {"lora_matched": "soft_moa"}, "tolerance": 0.02, **settings})


def test_equal_budgets_have_no_mismatch():
    # Seeds may see different numbers of tokens, rows of one seed may not.
    assert check(study()) == []


@pytest.mark.parametrize(
    ("field", "quantity"), [("steps", "steps"), ("tokens", "tokens seen"), ("rows_seen", "rows seen")]
)
def test_rows_of_one_data_set_and_seed_must_spend_the_same(field, quantity):
    (mismatch,) = check(study(("lora", 2, "Alpaca", {field: 1_234})))
    assert (mismatch.data, mismatch.seed, mismatch.quantity) == ("Alpaca", 2, quantity)
    assert mismatch.values["lora"] == 1_234
    assert mismatch.sentence.startswith(f"Alpaca, seed 2: {quantity} differ: 1,234 (lora); ")
    assert mismatch.sentence.endswith("(lora_matched, soft_moa). Asked for: equal for all rows.")


def test_matched_rows_must_have_the_parameters_of_the_other():
    found = check(study(), tolerance=0.01)
    assert [(mismatch.data, mismatch.seed) for mismatch in found] == [("MetaMath", None), ("Alpaca", None)]
    assert found[0].values == {"lora_matched": 2_040_000, "soft_moa": 2_000_000}
    assert "lora_matched within 0.01 of soft_moa, relative" in found[0].sentence
    assert (
        "lora_matched within 0.01 of lora"
        in check(study(), matched={"lora_matched": "lora"}, tolerance=0.01)[0].sentence
    )


def test_the_tolerance_is_relative_to_the_other_row():
    records = [make_run("lora"), make_run("soft_moa")]
    assert check(records, matched={"lora": "soft_moa"}, tolerance=0.5) == []
    assert len(check(records, matched={"soft_moa": "lora"}, tolerance=0.5)) == 1


def test_seeds_of_one_row_must_have_equal_parameters():
    (mismatch,) = check(study(("lora", 2, "MetaMath", {"trainable_parameters": 1_000_001})))
    assert mismatch.values == {"lora, seed 1": 1_000_000, "lora, seed 2": 1_000_001}
    assert "equal for all seeds" in mismatch.sentence


def test_missing_runs_and_untrained_rows_are_no_mismatch():
    untrained = make_run("lora", steps=0, tokens=0, rows_seen=0, trainable_parameters=0)
    assert check([untrained, make_run("soft_moa")]) == []
    assert check([]) == []


@pytest.mark.parametrize("tolerance", [-0.1, float("nan")])
def test_a_tolerance_below_zero_is_refused(tolerance):
    with pytest.raises(UserError, match=f"tolerance is {tolerance}"):
        check([], tolerance=tolerance)
