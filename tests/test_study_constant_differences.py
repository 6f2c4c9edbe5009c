"""Intervals, p values and verdicts where resampling has no spread to go by: values computed by hand."""

from dataclasses import replace
from math import comb

import numpy as np
import pytest

from moa_peft.study.statistics import paired_difference, verdict
from tests.study_records import make_run


def make_rows(rows, bases, *, measure, task="AddSub"):
    """Runs of a row and of its baseline from values [seeds][items]."""
    return (
        [make_run({task: values}, seed=seed, measure=measure) for seed, values in enumerate(rows)],
        [make_run({task: values}, row="lora", seed=seed, measure=measure) for seed, values in enumerate(bases)],
    )


def judge(result, *, lower_is_better, margin=None):
    """The verdict of a table with one comparison."""
    # As if from several seeds: of one, the verdict is that it is one.
    return verdict(
        replace(result, seeds_resampled=True),
        p_adjusted=result.p_value,
        lower_is_better=lower_is_better,
        margin=margin,
    )


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_equal_values_of_a_continuous_measure_are_one_model(num_seeds):
    values = [[0.1, 0.7, 0.3]] * num_seeds
    result = paired_difference(*make_rows(values, values, measure="nll"), measure="nll", tasks=["AddSub"])
    assert (result.difference, result.low, result.high, result.p_value, result.identical) == (0, 0, 0, 1, True)
    assert judge(result, lower_is_better=True) == judge(result, lower_is_better=True, margin=0.5) == "equivalent"
    # Answers that are all equally right come from different models as well.
    right = [[1.0, 0.0, 1.0]] * num_seeds
    result = paired_difference(*make_rows(right, right, measure="accuracy"), measure="accuracy", tasks=["AddSub"])
    assert not result.identical and judge(result, lower_is_better=False) == "not resolved"


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize(("num_items", "expected"), [(1, "not resolved"), (5, "not resolved"), (6, "worse")])
def test_a_constant_difference_is_judged_by_the_sign_test(num_seeds, num_items, expected):
    base = np.random.default_rng(1).gamma(2.0, size=(num_seeds, num_items))
    result = paired_difference(*make_rows(base + 0.3, base, measure="nll"), measure="nll", tasks=["AddSub"])
    assert result.low == result.high == result.difference == pytest.approx(0.3)
    assert result.p_value == pytest.approx(2.0 ** (1 - num_items))
    assert judge(result, lower_is_better=True) == expected
    assert judge(result, lower_is_better=True, margin=0.5) == ("equivalent" if num_items > 5 else "not resolved")


def test_the_sign_test_of_many_items_is_not_below_what_draws_could_give():
    base = np.random.default_rng(1).gamma(2.0, size=(3, 64))
    result = paired_difference(
        *make_rows(base - 0.3, base, measure="nll"), measure="nll", tasks=["AddSub"], resamples=999
    )
    assert result.p_value == pytest.approx(2 / 1000)
    assert judge(result, lower_is_better=True) == "better"


def test_constant_differences_in_two_directions_are_no_evidence():
    base = {"AddSub": [0.1, 0.2, 0.4, 0.3, 0.9, 0.8], "SVAMP": [0.5, 0.7]}
    moved = {"AddSub": [value + 0.1 for value in base["AddSub"]], "SVAMP": [value - 0.5 for value in base["SVAMP"]]}
    result = paired_difference([make_run(moved)], [make_run(base)], measure="nll", tasks=["AddSub", "SVAMP"])
    assert (result.difference, result.p_value) == (pytest.approx(-0.2), 1)
    assert judge(result, lower_is_better=True) == "not resolved"


def test_all_right_against_all_wrong_is_better_without_certainty():
    rows, bases = make_rows(np.ones((3, 64)), np.zeros((3, 64)), measure="accuracy")
    result = paired_difference(rows, bases, measure="accuracy", tasks=["AddSub"])
    # At most a share u of questions is otherwise (0.95 = 1 - (1 - u)^64), and each of those costs 2 at most.
    assert (result.difference, result.high) == (1, 1)
    assert result.low == pytest.approx(1 - 2 * (1 - 0.05 ** (1 / 64)))
    assert result.p_value == pytest.approx(2 / 10_001)
    assert judge(result, lower_is_better=False) == "better"
    few = paired_difference(*make_rows([[1, 1]], [[0, 0]], measure="accuracy"), measure="accuracy", tasks=["AddSub"])
    assert few.low < 0 and judge(few, lower_is_better=False) == "not resolved"


@pytest.mark.parametrize(("num_items", "expected"), [(58, "not resolved"), (59, "equivalent")])
def test_equal_answers_are_equivalent_where_the_rule_of_three_lies_inside_the_margin(num_items, expected):
    right = np.random.default_rng(2).random((3, num_items)) < 0.6
    result = paired_difference(*make_rows(right, right, measure="accuracy"), measure="accuracy", tasks=["AddSub"])
    limit = 1 - 0.05 ** (1 / num_items)
    assert (result.difference, result.p_value) == (0, 1)
    assert (result.low, result.high) == pytest.approx((-limit, limit))
    assert judge(result, lower_is_better=False) == "not resolved"
    assert judge(result, lower_is_better=False, margin=0.05) == expected


def test_intervals_of_constant_tasks_join_as_a_root_of_squares():
    scores = {"AddSub": [1.0] * 30, "SVAMP": [0.0, 1.0] * 20}
    base = {"AddSub": [0.0] * 30, "SVAMP": [0.0, 1.0] * 20}
    rows, bases = [make_run(scores, measure="accuracy")], [make_run(base, measure="accuracy")]
    result = paired_difference(rows, bases, measure="accuracy", tasks=["AddSub", "SVAMP"])
    u, v = 1 - 0.05 ** (1 / 30), 1 - 0.05 ** (1 / 40)
    assert result.difference == pytest.approx(0.5)
    assert (result.low, result.high) == pytest.approx((0.5 - ((2 * u) ** 2 + v**2) ** 0.5 / 2, 0.5 + v / 2))


def test_seeds_that_cancel_on_every_item_are_not_equal_answers():
    # Two of 40 questions are won at one of three seeds and lost at another.
    row, base = np.ones((3, 40)), np.ones((3, 40))
    row[0, 0] = base[0, 1] = row[1, 1] = base[1, 0] = 0
    result = paired_difference(*make_rows(row, base, measure="accuracy"), measure="accuracy", tasks=["AddSub"])
    assert result.difference == 0 and result.high == -result.low
    # With this share of such questions, 2 or fewer of 40 have probability 0.05.
    others = sum(comb(40, k) * result.high**k * (1 - result.high) ** (40 - k) for k in range(3))
    assert others == pytest.approx(0.05)


def test_seeds_with_equal_averages_leave_the_spread_of_items():
    # Both seeds gain 2 of 30, on different questions: no spread of averages, and all of the items' is noise of runs.
    row, base = np.zeros((2, 30)), np.zeros((2, 30))
    row[0, [0, 1, 2]] = row[1, [3, 4, 5]] = 1
    base[0, 6] = base[1, 7] = 1
    result = paired_difference(*make_rows(row, base, measure="accuracy"), measure="accuracy", tasks=["AddSub"])
    assert result.difference == pytest.approx(2 / 30)
    assert result.low < 0.02 and result.high > 0.12
