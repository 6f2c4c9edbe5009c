"""Answers of the three kinds on texts as models write them, and what a format says about them.

Expected values in answer_cases.jsonl were decided by reading the texts. "legacy" there is the published rule applied
by hand, wrong answers included.
"""

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moa_peft.answers import AnswerFormat, latex, require_math_verify
from moa_peft.answers.formats import number_text
from moa_peft.errors import UserError

CASES = [json.loads(line) for line in (Path(__file__).parent / "answer_cases.jsonl").read_text("utf-8").splitlines()]
SOURCES = {"gpt-3.5 rationale", "gemma-3-270m output", "written by hand"}
NUMBER = AnswerFormat(kind="number")
LETTER = AnswerFormat(kind="letter", choices=tuple("ABCDE"))
OPTION = AnswerFormat(kind="option", choices=("answer1", "answer2", "answer3", "answer4"))


def test_the_cases_are_many_and_mostly_real():
    sources = Counter(case["source"] for case in CASES)
    assert set(sources) == SOURCES
    assert len({(case["text"], case["kind"]) for case in CASES}) == len(CASES) >= 170
    assert sources["gpt-3.5 rationale"] + sources["gemma-3-270m output"] >= 150
    assert all(len(case["text"]) <= 600 for case in CASES)
    for mode in ("strict", "flexible", "legacy"):
        assert 10 < sum(case[mode] is None for case in CASES) < len(CASES) - 10


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{ascii(c['text'][-30:])}" for i, c in enumerate(CASES, start=1)])
def test_extraction(case):
    answers = AnswerFormat(kind=case["kind"], choices=tuple(case["choices"]))
    modes = ("strict", "flexible", "legacy")
    assert {mode: answers.extract(case["text"], mode=mode) for mode in modes} == {mode: case[mode] for mode in modes}


def test_a_strict_answer_is_also_the_flexible_one():
    for case in CASES:
        assert case["strict"] in (None, case["flexible"])


@pytest.mark.parametrize("answers", [NUMBER, LETTER, OPTION], ids=lambda answers: answers.kind)
def test_a_statement_is_read_back(answers):
    for choice in answers.choices or ("27", "-0.5", "1250"):
        for mode in ("strict", "flexible"):
            assert answers.extract(answers.statement(choice), mode=mode) == choice
    assert OPTION.statement("answer3") == "the correct answer is answer3"
    assert LETTER.statement("C") == "The answer is (C)."


@pytest.mark.parametrize(
    ("answers", "text", "expected"),
    [
        (NUMBER, "118558.0", "118558"),
        (NUMBER, "-3.50", "-3.5"),
        (NUMBER, "1,200", "1200"),
        (NUMBER, "2/8", "0.25"),
        (NUMBER, "3 + 4 = 7\n#### 7", "7"),
        (NUMBER, "none", None),
        (LETTER, "b", "B"),
        (LETTER, "\nRationale: A car needs 3 h.The answer is (D).", "D"),
        (LETTER, "F", None),
        (OPTION, "Answer3", "answer3"),
        (OPTION, "the correct answer is answer3", "answer3"),
        (OPTION, "answer5", None),
        (AnswerFormat(kind="option", choices=("true", "false")), "True", "true"),
    ],
)
def test_reference(answers, text, expected):
    assert answers.reference(text) == expected


def test_matches():
    assert NUMBER.matches("0.333", "0.3333333") and NUMBER.matches("27", "27.0")
    assert not NUMBER.matches("0.33", "0.3333333")
    assert not NUMBER.matches(None, "0")
    assert LETTER.matches("C", "C") and not LETTER.matches("C", "D") and not LETTER.matches(None, "C")
    assert OPTION.matches("answer1", "answer1") and not OPTION.matches(None, "answer1")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (27.0, "27"),
        (-0.5, "-0.5"),
        (-0.0, "0"),
        (1e16, "10000000000000000"),
        (1e-05, "0.00001"),
        (10.333333333333334, "10.333333333333334"),
        (1e30, "1e+30"),
    ],
)
def test_number_text(number, text):
    assert number_text(number) == text
    assert float(text) == number


def test_settings_are_checked():
    with pytest.raises(UserError, match="kind is 'word'; allowed are number, letter, option"):
        AnswerFormat(kind="word")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="choices is .* for kind='number'"):
        AnswerFormat(kind="number", choices=("A",))
    with pytest.raises(UserError, match="choices is .* for kind='option'"):
        AnswerFormat(kind="option")
    with pytest.raises(UserError, match="mode is 'loose'; allowed are strict, flexible, legacy"):
        LETTER.extract("The answer is (C).", mode="loose")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "expression",
    [
        "9^{9^{9^9}}",  # larger than any memory
        "((9^{99})^{99})^{99}",
        "99999!",
        r"\sqrt{-4}",
        r"\frac{1}{0}",
        "x + 2",
        r"\int_0^1 t",
        "2^",
        "1+" * 80 + "1",
    ],
)
def test_expressions_without_a_small_real_value_are_a_miss(expression):
    assert latex.latex_value(expression) is None


def test_latex_is_read_in_threads_as_in_the_main_thread():
    texts = [rf"The answer is $\sqrt{{{n * n}}}$." for n in range(2, 10)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda text: NUMBER.extract(text, mode="strict"), texts))
    assert answers == [str(n) for n in range(2, 10)]


def test_math_verify_is_needed_only_for_latex(monkeypatch):
    latex._evaluate.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert NUMBER.extract(r"\boxed{\frac{3}{4}}", mode="strict") == "0.75"
    with pytest.raises(UserError, match=r"math-verify.*moa-peft\[eval\]"):
        NUMBER.extract(r"The answer is $\sqrt{16}$.", mode="strict")
    with pytest.raises(UserError, match=r"moa-peft\[eval\]"):
        require_math_verify()


@pytest.mark.parametrize("answers", [NUMBER, LETTER, OPTION], ids=lambda answers: answers.kind)
def test_extraction_stays_fast_on_degenerate_text(answers):
    # Backtracking or a scan for every statement would take minutes here.
    units = ("answer is ", r"\boxed{", "(A) ", "A, ", "answer1 or ", "not answer2 ", "#### ", "C.\n", "$", "\n ")
    units += (
        "answer3",
        "11,",
        "1 234 ",
        "twenty ",
        "Sure\nQ: a\n",
        "<answer>",
        "<b>",
        "sqrt(",
        "3 x 10^",
        "C is right ",
    )
    runs = ("answer", "Q", "A", "1", "(", "\nB", r"\frac", "answer2", r"\text{")
    runs += ("### Input", "Sure\n### Question", "answer is 1", "answer is twenty", "B is", "C,", "2**", "Yes")
    words = "answer is 3 " + "word " * 4000 + "is 5"
    texts = [unit * 4000 for unit in units] + [run + " " * 20000 + "x" for run in runs]
    for text in [*texts, r"\," + "1" * 20000, words]:
        found = answers.extract(text, mode="flexible")
        assert found is None or found == answers.reference(found)
