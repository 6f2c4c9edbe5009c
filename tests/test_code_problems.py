"""HumanEval and MBPP files in their original forms, and what the model is asked."""

import json
from pathlib import Path

import pytest

from moa_peft.code_evaluation import load_problems, problems, prompt_text, run_program, sandbox, score_code
from moa_peft.errors import UserError
from moa_peft.intervals import wilson_interval

HUMANEVAL_ROWS = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def clamp(x, low, high):\n    """Move x into the range from low to high."""\n',
        "entry_point": "clamp",
        "canonical_solution": "    return max(low, min(x, high))\n",
        "test": "\n\nMETADATA = {}\ndef check(candidate):\n    assert candidate(5, 1, 3) * candidate(-1, 2, 3) == 6\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": 'import math\n\n\ndef area(r):\n    """Area of a circle."""\n',
        "entry_point": "area",
        "canonical_solution": "    return math.pi * r * r\n",
        "test": "def check(candidate):\n    assert abs(candidate(2) - 12.566370614359172) < 1e-9\n",
    },
]


def mbpp_row(number: int, *, sanitized: bool = False) -> dict:
    tests = [f"assert set(plus_{number}([1, 2])) == {{{1 + number}, {2 + number}}}", f"assert plus_{number}([]) == []"]
    row = {
        "task_id": number,
        "code": f"def plus_{number}(xs):\n    return [x + {number} for x in xs]",
        "test_list": [*tests, f"assert math.prod(plus_{number}([0])) == {number}", f"assert plus_{number}([-1])"],
    }
    if sanitized:
        return row | {
            "prompt": f"Write a function to add {number}.",
            "source_file": "x",
            "test_imports": ["import math"],
        }
    return row | {
        "text": f"Write a function to add {number}.",
        "test_setup_code": "import math",
        "challenge_test_list": ["assert False"],
    }


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "place",
    ["HumanEval.jsonl", "humaneval.jsonl", "human-eval/HumanEval.jsonl", "openai_humaneval/test.jsonl", "test.jsonl"],
)
def test_humaneval_is_found_in_a_folder(tmp_path, place):
    write_lines(tmp_path / place, HUMANEVAL_ROWS)
    write_lines(tmp_path / "a_train.jsonl", [{"question": "?"}])
    loaded = load_problems("humaneval", str(tmp_path))
    assert [problem.task_id for problem in loaded] == ["HumanEval/0", "HumanEval/1"]
    assert loaded == load_problems("humaneval", str(tmp_path / place))
    assert loaded[:1] == load_problems("humaneval", str(tmp_path), limit=1)
    assert loaded[1].entry_point == "area"
    assert loaded[1].tests.rstrip().endswith("check(area)")
    assert "\ndef " in loaded[0].stop_strings


def test_humaneval_is_read_from_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "openai_humaneval" / "test-00000-of-00001.parquet"
    file.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(HUMANEVAL_ROWS), file)
    write_lines(tmp_path / "HumanEval.jsonl", HUMANEVAL_ROWS[:1])
    assert len(load_problems("humaneval", str(tmp_path))) == 1
    assert load_problems("humaneval", str(file.parent))[1].prompt == HUMANEVAL_ROWS[1]["prompt"]


def test_mbpp_is_reduced_to_its_test_split_where_the_file_holds_all(tmp_path):
    rows = [mbpp_row(number) for number in range(1, 975)]
    loaded = load_problems("mbpp", str(write_lines(tmp_path / "mbpp.jsonl", rows)))
    assert [problem.task_id for problem in loaded] == [str(number) for number in range(11, 511)]
    assert [problem.task_id for problem in load_problems("mbpp", str(tmp_path), limit=2)] == ["11", "12"]
    few = write_lines(tmp_path / "few.jsonl", rows[600:603])
    assert [problem.task_id for problem in load_problems("mbpp", str(few))] == ["601", "602", "603"]


@pytest.mark.parametrize("sanitized", [False, True])
def test_both_forms_of_mbpp(tmp_path, sanitized):
    name = "sanitized-mbpp.json" if sanitized else "mbpp.json"
    (tmp_path / name).write_text(json.dumps([mbpp_row(20, sanitized=sanitized), mbpp_row(35, sanitized=sanitized)]))
    problem = load_problems("mbpp", str(tmp_path))[1]
    assert (problem.task_id, problem.entry_point) == ("35", "plus_35")
    assert problem.prompt == "Write a function to add 35."
    assert problem.tests.startswith("import math\nassert set(plus_35([1, 2]))")
    assert "assert False" not in problem.tests
    assert len(problem.shown_tests) == 3
    assert problem.stop_strings[0] == "[DONE]"


def test_the_full_mbpp_is_preferred_to_the_sanitized(tmp_path):
    write_lines(tmp_path / "sanitized" / "test-00000.jsonl", [mbpp_row(20, sanitized=True)])
    write_lines(tmp_path / "full" / "test-00000.jsonl", [mbpp_row(20), mbpp_row(21)])
    write_lines(tmp_path / "full" / "train-00000.jsonl", [mbpp_row(701)])
    assert len(load_problems("mbpp", str(tmp_path))) == 2


def test_a_hub_id_is_loaded_with_its_test_split(monkeypatch):
    asked = []

    def rows(path, split):
        asked.append((path, split))
        return ((row, f"{path} row", "test") for row in HUMANEVAL_ROWS)

    monkeypatch.setattr(problems, "hub_rows", rows)
    assert len(load_problems("humaneval", "openai/openai_humaneval")) == 2
    assert asked == [("openai/openai_humaneval", "test")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**HUMANEVAL_ROWS[0], "entry_point": ""}, "line 2: the field entry_point"),
        (
            {key: value for key, value in HUMANEVAL_ROWS[0].items() if key != "test"},
            "line 2: the field test .*missing",
        ),
        ({**HUMANEVAL_ROWS[0], "prompt": 3}, "line 2: the field prompt"),
        (HUMANEVAL_ROWS[1], "line 2: task_id 'HumanEval/1' occurs twice"),
        ([1], "line 2: a problem must be an object"),
    ],
)
def test_a_wrong_humaneval_row_is_named(tmp_path, row, message):
    file = write_lines(tmp_path / "HumanEval.jsonl", [HUMANEVAL_ROWS[1], row])
    with pytest.raises(UserError, match=message):
        load_problems("humaneval", str(file))


@pytest.mark.parametrize("change", [{"test_list": []}, {"test_list": [1]}, {"task_id": None}, {"text": " "}])
def test_a_wrong_mbpp_row_is_named(tmp_path, change):
    file = write_lines(tmp_path / "mbpp.jsonl", [{**mbpp_row(20), **change}])
    with pytest.raises(UserError, match=f"line 1: .*{next(iter(change))}"):
        load_problems("mbpp", str(file))


def test_what_is_not_there_is_refused(tmp_path):
    write_lines(tmp_path / "gsm8k.jsonl", [{"question": "?"}])
    for name, data, message in [
        ("humaneval", str(tmp_path), "no file of humaneval .*gsm8k.jsonl"),
        ("mbpp", str(tmp_path / "no.jsonl"), "no file or folder"),
        ("mbpp", " ", "data is empty"),
        ("apps", str(tmp_path), "name='apps'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_problems(name, data)
    with pytest.raises(UserError, match="limit=0"):
        load_problems("mbpp", str(tmp_path), limit=0)


def test_what_the_model_is_asked(tmp_path):
    humaneval = load_problems("humaneval", str(write_lines(tmp_path / "HumanEval.jsonl", HUMANEVAL_ROWS)))[0]
    assert prompt_text(humaneval, form="continuation") == humaneval.prompt
    assert f"```python\n{humaneval.prompt}```" in prompt_text(humaneval)
    mbpp = load_problems("mbpp", str(write_lines(tmp_path / "mbpp.jsonl", [mbpp_row(20)])))[0]
    for form in ("instruction", "continuation"):
        text = prompt_text(mbpp, form=form)
        assert "Write a function to add 20." in text
        assert "assert plus_20([]) == []" in text
        assert "plus_20([-1])" not in text
    assert compile(prompt_text(mbpp, form="continuation"), "<prompt>", "exec")
    with pytest.raises(UserError, match="form='raw'"):
        prompt_text(mbpp, form="raw")


@pytest.fixture
def loaded(tmp_path):
    humaneval = load_problems("humaneval", str(write_lines(tmp_path / "HumanEval.jsonl", HUMANEVAL_ROWS)))
    return [*humaneval, *load_problems("mbpp", str(write_lines(tmp_path / "mbpp.jsonl", [mbpp_row(20)])))]


@pytest.mark.skipif(sandbox.isolation_problem() is not None, reason="no namespaces here")
def test_reference_solutions_pass_and_wrong_ones_fail(loaded):
    right = [HUMANEVAL_ROWS[0]["canonical_solution"], HUMANEVAL_ROWS[1]["canonical_solution"], mbpp_row(20)["code"]]
    completions = [
        [right[0], "    return x\n", "    import sys\n    sys.exit(0)\n"],
        [f"```python\n{HUMANEVAL_ROWS[1]['prompt']}{right[1]}```", "    return radius\n"],
        ["def plus_20(xs):\n    return xs\n", right[2], right[2] + "\n[DONE]"],
    ]
    score = score_code(loaded, completions, k=(1, 2), workers=2)
    passed = {task: [outcome.passed for outcome in samples] for task, samples in score.outcomes.items()}
    assert passed == {"HumanEval/0": [True, False, False], "HumanEval/1": [True, False], "20": [False, True, True]}
    assert score.pass_at[1].value == pytest.approx((1 / 3 + 1 / 2 + 2 / 3) / 3)
    assert score.pass_at[2].value == pytest.approx((2 / 3 + 1 + 1) / 3)
    interval = score.pass_at[1].interval
    assert interval is not None
    assert 1 / 3 <= interval.low < score.pass_at[1].value < interval.high <= 2 / 3
    assert score.reasons == {"passed": 4, "failed": 2, "error: SystemExit": 1, "error: NameError": 1}
    written = json.loads(json.dumps(score.to_dict()))
    assert written["pass_at"]["1"]["interval_95"] == [interval.low, interval.high]
    assert (written["num_problems"], written["num_samples"]) == (3, 8)
    assert written["problems"][2] == {"task_id": "20", "num_passed": 2, "reasons": ["failed", "passed", "passed"]}


@pytest.mark.skipif(sandbox.isolation_problem() is not None, reason="no namespaces here")
def test_one_problem_has_no_interval(loaded):
    score = score_code(loaded[:1], [[HUMANEVAL_ROWS[0]["canonical_solution"]]])
    assert (score.pass_at[1].value, score.pass_at[1].interval) == (1.0, None)
    assert not run_program(loaded[0].prompt, tests=loaded[0].tests).passed


@pytest.mark.parametrize("passes", [True, False])
def test_problems_that_all_pass_or_all_fail_are_no_certainty(loaded, monkeypatch, passes):
    monkeypatch.setattr("moa_peft.code_evaluation.scoring.check_sandbox", lambda **_: None)
    outcome = sandbox.Outcome(passed=passes, reason="passed" if passes else "failed")
    monkeypatch.setattr("moa_peft.code_evaluation.scoring.run_program", lambda *_, **__: outcome)
    score = score_code(loaded, [["x", "y"]] * 3, k=(1, 2))
    for k in (1, 2):
        assert score.pass_at[k].value == (1.0 if passes else 0.0)
        assert score.pass_at[k].interval == wilson_interval(3 if passes else 0, 3)


@pytest.mark.parametrize(
    ("completions", "settings", "message"),
    [
        ([["x"]], {}, "completions has 1 rows for 3 problems"),
        ([["x"], [], ["x"]], {}, "completions of HumanEval/1"),
        ([["x"], "x", ["x"]], {}, "completions of HumanEval/1"),
        ([["x"] * 2, ["x"], ["x"]], {"k": (1, 2)}, "k=2 needs at least 2 samples"),
        ([["x"]] * 3, {"k": ()}, "k is empty"),
        ([["x"]] * 3, {"workers": 0}, "workers=0"),
        ([["x"]] * 3, {"timeout_s": -1}, "timeout_s=-1"),
    ],
)
def test_all_is_checked_before_a_program_runs(loaded, monkeypatch, completions, settings, message):
    monkeypatch.setattr("moa_peft.code_evaluation.scoring.run_program", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(UserError, match=message):
        score_code(loaded, completions, **settings)
