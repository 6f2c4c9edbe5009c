"""pass@k against counting all choices, its limits, and numbers that do not fit into a float."""

import itertools
import math

import pytest

from moa_peft.code_evaluation import mean_pass_at_k, pass_at_k
from moa_peft.errors import UserError


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_it_is_the_share_of_choices_with_a_correct_sample(num_samples):
    for num_correct in range(num_samples + 1):
        for k in range(1, num_samples + 1):
            choices = list(itertools.combinations(range(num_samples), k))
            share = sum(min(choice) < num_correct for choice in choices) / len(choices)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share, abs=1e-15)


def test_known_values():
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9)
    assert pass_at_k(200, 1, 10) == pytest.approx(0.05)
    assert (pass_at_k(10, 0, 5), pass_at_k(10, 10, 1), pass_at_k(10, 6, 5)) == (0.0, 1.0, 1.0)


def test_binomials_beyond_the_range_of_a_float():
    assert pass_at_k(10_000, 1, 5_000) == 0.5
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-12)
    product = math.prod(1 - 500 / i for i in range(3_000 - 3 + 1, 3_001))
    assert pass_at_k(3_000, 3, 500) == pytest.approx(1 - product, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 1, 4), "k=4 needs at least 4 samples"),
        ((3, 1, 0), "k=0"),
        ((3, 4, 1), "num_correct=4"),
        ((3, -1, 1), "num_correct=-1"),
        ((0, 0, 1), "num_samples=0"),
        ((3, 1, 1.0), "k=1.0"),
        ((3, True, 1), "num_correct=True"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        pass_at_k(*arguments)


def test_the_mean_is_over_problems_and_not_over_samples():
    correct = [[True], [False, False, True, False]]
    assert mean_pass_at_k(correct, 1) == pytest.approx((1 + 1 / 4) / 2)
    assert mean_pass_at_k([[True, False, False], [False, False, False]], 2) == pytest.approx((2 / 3) / 2)
    with pytest.raises(UserError, match="k=2"):
        mean_pass_at_k(correct, 2)
    with pytest.raises(UserError, match="empty"):
        mean_pass_at_k([], 1)
