"""Means, paired differences and verdicts of a study: values computed by hand, and the coverage of the interval."""

import json
from dataclasses import replace

import numpy as np
import pytest

from moa_peft.errors import UserError
from moa_peft.study.records import RunRecord, averaged_tasks
from moa_peft.study.statistics import (
    PairedDifference,
    holm,
    macro_average,
    mean_and_spread,
    paired_difference,
    verdict,
)
from tests.study_records import make_run


def test_macro_average_gives_every_task_the_same_weight():
    run = make_run({"AddSub": [1.0, 2.0, 6.0], "SVAMP": [0.5]})
    assert macro_average(run, measure="nll", tasks=["AddSub", "SVAMP"]) == pytest.approx(1.75)
    assert macro_average(run, measure="nll", tasks=["AddSub"]) == pytest.approx(3.0)
    with pytest.raises(UserError, match="no 'nll' for the task 'GSM8K'"):
        macro_average(run, measure="nll", tasks=["AddSub", "GSM8K"])
    with pytest.raises(UserError, match="at least one"):
        macro_average(run, measure="nll", tasks=[])


def test_mean_and_spread():
    spread = mean_and_spread([1.0, 2.0, 6.0])
    assert spread.mean == pytest.approx(3.0)
    assert spread.deviation == pytest.approx(7**0.5)
    assert mean_and_spread([4.0]).deviation is None
    with pytest.raises(UserError, match="no values"):
        mean_and_spread([])


def test_difference_is_paired_by_item_and_not_by_position():
    baseline = make_run({"AddSub": [1.0, 2.0, 3.0, 4.0]}, row="lora")
    row = make_run({"AddSub": [0.9, 1.8, 2.9, 3.8]})
    (scores,) = row.scores
    shuffled = replace(scores, items=scores.items[::-1], values=scores.values[::-1])
    for run in (row, replace(row, scores=(shuffled,))):
        result = paired_difference([run], [baseline], measure="nll", tasks=["AddSub"])
        assert result.difference == pytest.approx(-0.15)
        # Unpaired, the spread of the items (1 to 4) would make an interval ten times as wide.
        assert (result.low, result.high) == pytest.approx((-0.2, -0.1))
        assert (result.num_items, result.num_seeds, result.seeds_resampled) == (4, 1, False)


def test_one_seed_matches_the_exact_bootstrap_distribution():
    # Two items with differences -1 and +3: means of two draws are -1, 1 (twice) and 3, each with probability 1/4.
    result = paired_difference(
        [make_run({"AddSub": [1.0, 4.0]})], [make_run({"AddSub": [2.0, 1.0]})], measure="nll", tasks=["AddSub"]
    )
    assert result.difference == pytest.approx(1.0)
    assert (result.low, result.high) == pytest.approx((-1.0, 3.0))
    assert result.p_value == pytest.approx(0.5, abs=0.02)


def test_several_tasks_and_seeds():
    generator = np.random.default_rng(3)
    sizes = {"AddSub": 40, "SVAMP": 160}
    levels = {"AddSub": -0.30, "SVAMP": -0.10}
    rows, baselines = [], []
    for seed in (1, 2, 3):
        base = {task: generator.gamma(2.0, size=size) for task, size in sizes.items()}
        moved = {task: base[task] + levels[task] + 0.02 * generator.normal(size=sizes[task]) for task in sizes}
        baselines.append(make_run(base, row="lora", seed=seed))
        rows.append(make_run(moved, seed=seed))
    result = paired_difference(rows, baselines[::-1], measure="nll", tasks=list(sizes))
    assert result.difference == pytest.approx(-0.20, abs=0.005)
    assert -0.22 < result.low < result.difference < result.high < -0.18
    assert (result.num_items, result.num_seeds, result.seeds_resampled) == (200, 3, True)
    # Beyond all draws p is their number's reciprocal, never 0.
    few = paired_difference(rows, baselines, measure="nll", tasks=list(sizes), resamples=99)
    assert few.p_value == pytest.approx(2 / 100)
    assert result == paired_difference(rows, baselines, measure="nll", tasks=list(sizes))
    assert result != paired_difference(rows, baselines, measure="nll", tasks=list(sizes), seed=1)
    swapped = paired_difference(baselines, rows, measure="nll", tasks=list(sizes))
    assert swapped.difference == pytest.approx(-result.difference)


def test_what_does_not_pair_is_refused():
    base = [make_run({"AddSub": [0.1, 0.2]}, row="lora", seed=seed) for seed in (1, 2)]
    row = [make_run({"AddSub": [0.3, 0.1]}, seed=seed) for seed in (1, 2)]
    with pytest.raises(UserError, match=r"the row has the seeds \[1\], the baseline \[1, 2\]"):
        paired_difference(row[:1], base, measure="nll", tasks=["AddSub"])
    with pytest.raises(UserError, match="at least one"):
        paired_difference([], [], measure="nll", tasks=["AddSub"])
    with pytest.raises(UserError, match="a seed twice"):
        paired_difference([row[0], row[0]], base, measure="nll", tasks=["AddSub"])
    longer = [row[0], make_run({"AddSub": [0.3, 0.1, 0.9]}, seed=2)]
    with pytest.raises(UserError, match=r"seed 2 was scored on other items of 'AddSub'.*'AddSub-2'"):
        paired_difference(longer, base, measure="nll", tasks=["AddSub"])
    with pytest.raises(UserError, match="no 'accuracy' for the task"):
        paired_difference(row, base, measure="accuracy", tasks=["AddSub"])
    with pytest.raises(UserError, match="resamples is 0"):
        paired_difference(row, base, measure="nll", tasks=["AddSub"], resamples=0)


def simulated_study(generator, *, num_seeds, num_items, seed_noise, item_noise, run_noise):
    """Differences without a true difference, as records: [seeds, items] = seed effect + item effect + the rest."""
    differences = (
        seed_noise * generator.normal(size=(num_seeds, 1))
        + item_noise * generator.normal(size=(1, num_items))
        + run_noise * generator.normal(size=(num_seeds, num_items))
    )
    rows = [make_run({"AddSub": values}, seed=seed) for seed, values in enumerate(differences)]
    bases = [make_run({"AddSub": [0.0] * num_items}, row="lora", seed=seed) for seed in range(num_seeds)]
    return rows, bases, differences


def resampled_seeds_interval(differences, generator, *, resamples):
    """The plain hierarchical bootstrap, to show that the simulation tells a bad interval from a good one."""
    num_seeds, num_items = differences.shape
    seeds = generator.integers(num_seeds, size=(resamples, num_seeds, 1))
    items = generator.integers(num_items, size=(resamples, 1, num_items))
    return np.percentile(differences[seeds, items].mean(axis=(1, 2)), [2.5, 97.5])


# (seeds, noise of seeds, of items, of single items in single runs)
MIXTURES = [(3, 0.3, 0.1, 0.1), (3, 0.05, 0.5, 0.3), (3, 0.0, 0.0, 1.0), (2, 0.2, 0.3, 0.3), (5, 0.1, 0.3, 0.3)]


@pytest.mark.parametrize(("num_seeds", "seed_noise", "item_noise", "run_noise"), MIXTURES)
def test_the_interval_covers_no_difference_as_often_as_it_says(num_seeds, seed_noise, item_noise, run_noise):
    generator = np.random.default_rng(20)
    studies, resamples = 300, 300
    covered = significant = plainly_covered = 0
    for number in range(studies):
        rows, bases, differences = simulated_study(
            generator,
            num_seeds=num_seeds,
            num_items=25,
            seed_noise=seed_noise,
            item_noise=item_noise,
            run_noise=run_noise,
        )
        result = paired_difference(rows, bases, measure="nll", tasks=["AddSub"], resamples=resamples, seed=number)
        covered += result.low <= 0 <= result.high
        significant += result.p_value <= 0.05
        low, high = resampled_seeds_interval(differences, generator, resamples=resamples)
        plainly_covered += low <= 0 <= high
    # 300 studies at 95 % have a standard error of 1.3 points.
    assert 0.915 <= covered / studies <= 0.985
    assert significant / studies <= 0.085
    if seed_noise > 0.2:
        assert plainly_covered / studies < 0.87


def test_the_interval_finds_a_difference_larger_than_the_noise():
    generator = np.random.default_rng(4)
    rows, bases, _ = simulated_study(
        generator, num_seeds=3, num_items=50, seed_noise=0.02, item_noise=0.2, run_noise=0.2
    )
    better = [
        replace(run, scores=tuple(replace(s, values=tuple(v - 0.3 for v in s.values)) for s in run.scores))
        for run in rows
    ]
    result = paired_difference(better, bases, measure="nll", tasks=["AddSub"])
    assert result.high < 0
    assert result.p_value < 0.05


def interval(low, high):
    return PairedDifference(
        difference=(low + high) / 2,
        low=low,
        high=high,
        p_value=0.001,
        num_items=10,
        num_seeds=3,
        seeds_resampled=True,
        identical=False,
    )


@pytest.mark.parametrize(
    ("low", "high", "p_adjusted", "lower_is_better", "margin", "expected"),
    [
        (-0.3, -0.1, 0.01, True, None, "better"),
        (-0.3, -0.1, 0.01, False, None, "worse"),
        (0.1, 0.3, 0.01, True, None, "worse"),
        (0.1, 0.3, 0.01, False, 0.2, "better"),
        # Inside the margin nothing matters, whether 0 is excluded or not.
        (0.1, 0.3, 0.01, False, 0.5, "equivalent"),
        (-0.004, -0.001, 0.01, True, 0.01, "equivalent"),
        (-0.004, -0.001, 0.9, True, 0.01, "equivalent"),
        (-0.01, -0.001, 0.01, True, 0.01, "better"),
        # Holm's p decides as well.
        (-0.3, -0.1, 0.05, True, None, "not resolved"),
        (0.1, 0.3, 0.08, True, 0.2, "not resolved"),
        (-0.1, 0.1, 0.01, True, None, "not resolved"),
        (-0.1, 0.1, 0.9, True, 0.2, "equivalent"),
        (-0.1, 0.1, 0.9, True, 0.1, "not resolved"),
        (-0.1, 0.3, 0.9, False, 0.2, "not resolved"),
        (0.0, 0.1, 0.01, False, None, "not resolved"),
    ],
)
def test_verdict(low, high, p_adjusted, lower_is_better, margin, expected):
    found = verdict(interval(low, high), p_adjusted=p_adjusted, lower_is_better=lower_is_better, margin=margin)
    assert found == expected


def test_verdict_refuses_a_margin_of_zero():
    with pytest.raises(UserError, match="margin is 0"):
        verdict(interval(-1, 1), p_adjusted=0.5, lower_is_better=True, margin=0)


def test_holm():
    # By hand: 0.01 x 4, max(0.04, 0.02 x 3), max(0.06, 0.03 x 2), max(0.06, 0.9).
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.01, 0.04], num_tests=3) == pytest.approx([0.03, 0.08])


def test_twins_stay_out_of_the_average():
    def run(*tasks):
        return make_run({task: [0.5] for task in tasks})

    parts = run("AddSub", "MultiArith", "MultiArith (twins)", "MultiArith (rest)")
    assert averaged_tasks([parts], measure="nll") == ("AddSub", "MultiArith (rest)")
    assert averaged_tasks([run("MultiArith", "SVAMP")], measure="nll") == ("MultiArith", "SVAMP")
    assert averaged_tasks([parts], measure="accuracy") == ()


def test_transfer_sets_and_their_parts_stay_out_of_the_average():
    run = make_run(
        {name: [0.5] for name in ("AddSub", "piqa (transfer)", "SVAMP (transfer)", "SVAMP (transfer) (rest)")}
    )
    assert averaged_tasks([run], measure="nll") == ("AddSub",)


def test_records_survive_json():
    run = make_run({"AddSub": [0.25, 1 / 3]}, peak_memory_bytes=None, validation_loss=None)
    assert RunRecord.from_dict(json.loads(json.dumps(run.to_dict())), source="run.json") == run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("steps"), "'steps' is required"),
        (lambda d: d.update(colour=1), "unknown option 'colour'"),
        (lambda d: d.update(steps="200"), "steps is '200'; it must be a finite int"),
        (lambda d: d.update(steps=True), "steps is True"),
        (lambda d: d.update(tokens=-1), "tokens is -1"),
        (lambda d: d.update(step_seconds=float("nan")), "step_seconds is nan"),
        (lambda d: d.update(scores={}), "scores is dict"),
        (lambda d: d.update(scores=[3]), r"scores\[0\] is int"),
        (lambda d: d["scores"].append(d["scores"][0]), "'AddSub', 'nll' occur twice"),
        (lambda d: d["scores"][0]["values"].pop(), "3 items with 2 values"),
        (lambda d: d["scores"][0].update(items=["a", "b", "a"]), "the item 'a' occurs twice"),
        (lambda d: d["scores"][0].update(values=[1, 2, float("nan")]), "'AddSub-2' is nan.*diverged"),
        (lambda d: d["scores"][0].update(measure="accuracy"), "is 4.0; allowed are finite numbers from 0 to 1"),
    ],
)
def test_damaged_records_are_refused_by_name(change, message):
    content = make_run({"AddSub": [0.5, 4.0, 1.0]}).to_dict()
    change(content)
    with pytest.raises(UserError, match=rf"(?s)^runs/a/1\.json: .*{message}.*delete it"):
        RunRecord.from_dict(content, source="runs/a/1.json")
    with pytest.raises(UserError, match="runs/a: the content is list"):
        RunRecord.from_dict([], source="runs/a")
