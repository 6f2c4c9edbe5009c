"""The generated data set: right arithmetic, no leak between the splits, the same rows everywhere."""

import ast
import hashlib
import json
import operator
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest

from moa_peft.errors import UserError
from moa_peft.quickstart import word_problems
from moa_peft.quickstart.templates import Template, evaluate, fill
from moa_peft.quickstart.vocabulary import NAMES, NOUNS, plural
from moa_peft.quickstart.word_problems import (
    TEST_TEMPLATES,
    TRAIN_TEMPLATES,
    WordProblem,
    generate_word_problems,
    split_of_operands,
    write_word_problems,
)

NUM_ROWS = {"train": 4000, "validation": 600, "test": 600}
# What a solution may use beyond the numbers of the question: percent, halves, thirds, hours, weeks, one more boat.
CONSTANTS = {1, 2, 3, 7, 60, 100}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
STATEMENT = re.compile(r"([0-9]+(?: [-+*/] [0-9]+)+) = ([0-9]+)")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[WordProblem]]:
    return {split: generate_word_problems(split, num_rows=size) for split, size in NUM_ROWS.items()}


@pytest.fixture(scope="module")
def every_problem(splits: dict[str, list[WordProblem]]) -> list[WordProblem]:
    return [problem for problems in splits.values() for problem in problems]


def calculate(expression: str) -> Fraction:
    """Python's own grammar as the referee, exact: the templates compute from left to right instead."""

    def visit(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](visit(node.left), visit(node.right))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int)
        return Fraction(node.value)

    return visit(ast.parse(expression, mode="eval").body)


def test_template_counts_and_operations():
    assert len(TRAIN_TEMPLATES) >= 80 and len(TEST_TEMPLATES) >= 16
    train_operations = {template.operation for template in TRAIN_TEMPLATES}
    assert {template.operation for template in TEST_TEMPLATES} == train_operations
    assert len(train_operations) >= 10


def test_templates_are_distinct_in_key_and_text():
    templates = TRAIN_TEMPLATES + TEST_TEMPLATES
    assert len({template.key for template in templates}) == len(templates)
    assert len({template.question for template in templates}) == len(templates)


def test_all_templates_occur(splits):
    assert {problem.template for problem in splits["train"]} == {template.key for template in TRAIN_TEMPLATES}
    assert {problem.template for problem in splits["test"]} == {template.key for template in TEST_TEMPLATES}


def test_every_statement_is_true_and_the_last_one_is_the_answer(every_problem):
    for problem in every_problem:
        statements = STATEMENT.findall(problem.output)
        assert statements, problem
        assert len(statements) == problem.output.count("="), problem
        for expression, result in statements:
            assert calculate(expression) == int(result), problem
        assert int(statements[-1][1]) == problem.answer, problem
        assert problem.output.endswith(f" The answer is {problem.answer}."), problem


def test_solutions_use_only_known_numbers(every_problem):
    for problem in every_problem:
        known = set(problem.operands) | CONSTANTS
        for expression, result in STATEMENT.findall(problem.output):
            unknown = {int(number) for number in re.findall("[0-9]+", expression)} - known
            # With a remainder, the quotient is stated without a calculation: "7 bags hold 7 * 5 = 35".
            assert not unknown or unknown == {problem.operands[0] // problem.operands[1]}, problem
            known.add(int(result))


def test_operands_are_the_numbers_of_the_question(every_problem):
    for problem in every_problem:
        stated = tuple(int(number) for number in re.findall("[0-9]+", problem.instruction))
        assert tuple(dict.fromkeys(stated)) == tuple(dict.fromkeys(problem.operands)), problem


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("left_over", lambda a, b: a % b),
        ("ribbon_rest", lambda a, b: a % b),
        ("egg_cartons", lambda a, b: a % b),
        ("boats", lambda a, b: -(-a // b)),
        ("mean_of_two", lambda a, b: Fraction(a + b, 2)),
        ("two_temperatures", lambda a, b: Fraction(a + b, 2)),
        ("mean_of_three", lambda a, b, c: Fraction(a + b + c, 3)),
        ("percent_of", lambda a, p: Fraction(a * p, 100)),
        ("discount", lambda a, p: a * (1 - Fraction(p, 100))),
        ("growth", lambda a, p: a * (1 + Fraction(p, 100))),
        ("sale_bike", lambda a, p: a * (1 - Fraction(p, 100))),
        ("keep_and_share", lambda a, b, c: Fraction(a - b, c)),
        ("together_in_boxes", lambda a, b, c: Fraction(a + b, c)),
        ("same_speed", lambda a, b, c: Fraction(a, b) * c),
        ("two_kinds", lambda a, b, c, d: a * b + c * d),
        ("pick_eat_divide", lambda a, b, c, d: Fraction(a + b - c, d)),
        ("unknown_start", lambda b, a: a - b),
        ("lamp_budget", lambda a, b, c: a - b * c),
        ("unit_price", lambda a, b: Fraction(a, b)),
        ("change", lambda price, paid: paid - price),
        ("road_ahead", lambda a, b: a - b),
        ("handed_out_sheets", lambda a, b: Fraction(a, b)),
        ("pool_laps", lambda a, b: 2 * a - b),
        ("hostel_nights", lambda price, nights: price * nights),
        ("mowing_lawns", lambda a, b, c: a * b + c),
        ("rent_rise", lambda a, p: a * (1 + Fraction(p, 100))),
        ("lake_walk", lambda a, b, c: a + b + c),
        ("photo_album", lambda a, b: a % b),
        ("two_parcels", lambda a, b: Fraction(a + b, 2)),
        ("theater_seats", lambda a, b, c: Fraction(a - b, c)),
        ("daily_letters", lambda a, b, c: (a + b) * c),
        ("harbor_boats", lambda a, b, c: a + b - c),
        ("hotel_beds", lambda a, b, c, d: a * b + c * d),
        ("fair_cupcakes", lambda a, b, c, d: a * b + c - d),
    ],
)
def test_answer_by_an_independent_formula(every_problem, key, expected):
    problems = [problem for problem in every_problem if problem.template == key]
    assert problems
    for problem in problems:
        assert expected(*problem.operands) == problem.answer, problem


def test_no_question_occurs_twice(every_problem):
    counts = Counter(problem.instruction for problem in every_problem)
    assert max(counts.values()) == 1


def test_test_templates_and_operands_are_in_no_training_row(splits):
    for seed in (0, 1, 77):
        train = splits["train"] if seed == 0 else generate_word_problems("train", num_rows=1500, seed=seed)
        templates = {problem.template for problem in train}
        operands = {tuple(sorted(problem.operands)) for problem in train}
        for split in ("validation", "test"):
            assert not operands & {tuple(sorted(problem.operands)) for problem in splits[split]}
        assert not templates & {problem.template for problem in splits["test"]}


def test_operand_partition_ignores_order_and_covers_all_splits():
    pairs = [(a, b) for a in range(2, 40) for b in range(2, 40)]
    assert all(split_of_operands(pair) == split_of_operands(pair[::-1]) for pair in pairs)
    shares = {split: count / len(pairs) for split, count in Counter(map(split_of_operands, pairs)).items()}
    assert shares == {"train": pytest.approx(0.7, abs=0.05), "validation": pytest.approx(0.1, abs=0.03)} | {
        "test": pytest.approx(0.2, abs=0.05)
    }


def test_templates_are_balanced(splits):
    for problems in splits.values():
        counts = Counter(problem.template for problem in problems)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_lengths(every_problem):
    assert max(len(problem.instruction.split()) for problem in every_problem) <= 60
    assert max(len(problem.output.split()) for problem in every_problem) <= 40
    assert max(problem.answer for problem in every_problem) < 1000
    assert min(problem.answer for problem in every_problem) >= 1


def test_singular_and_plural(every_problem):
    nouns = {noun for pool in NOUNS.values() for noun in pool}
    counted = nouns | {"dollar", "person", "child", "loaf", "egg", "piece", "box", "hour", "page", "year", "bag"}
    singulars = "|".join(sorted(map(re.escape, counted), key=len, reverse=True))
    wrong_singular = re.compile(rf"\b(?:[02-9]|[1-9][0-9]+) (?:{singulars})\b(?! piece)")
    wrong_plural = re.compile(rf"(?:^|[^0-9])1 (?:{'|'.join(map(re.escape, map(plural, counted)))})\b")
    texts = [text for problem in every_problem for text in (problem.instruction, problem.output)]
    assert any("= 1 " in text for text in texts), "the singular must occur, or this test shows nothing"
    for text in texts:
        assert not wrong_singular.search(text), text
        assert not wrong_plural.search(text), text


def test_pronouns_agree_with_the_name(every_problem):
    gender = dict(NAMES)
    pronouns = {"f": {"she", "her"}, "m": {"he", "him", "his"}}
    for problem in every_problem:
        words = re.findall("[A-Za-z]+", problem.instruction)
        used = {word.lower() for word in words} & (pronouns["f"] | pronouns["m"])
        genders = {gender[word] for word in words if word in gender}
        assert all(any(pronoun in pronouns[each] for each in genders) for pronoun in used), problem


def test_text_is_clean(every_problem):
    for problem in every_problem:
        for text in (problem.instruction, problem.output):
            assert text.isascii() and re.match("[A-Z0-9]", text) and not re.search(r"[{}]|  |\ba [aeiou]", text), text
        assert problem.instruction.endswith("?")


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("box", "boxes"), ("cherry", "cherries"), ("yo-yo", "yo-yos"), ("key ring", "key rings"), ("child", "children")]
    + [("day", "days"), ("peach", "peaches"), ("bus", "buses"), ("loaf", "loaves"), ("scarf", "scarves")],
)
def test_plural(noun, expected):
    assert plural(noun) == expected


def test_rows_are_pinned():
    rows = [problem.as_row() for problem in generate_word_problems("train", num_rows=500, seed=3)]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == "4308e95fed6ebaddc24030b6cec2e264126dd66e0e210ccd31cc9db4f2a71ca1"


def test_seed_and_prefix():
    long = generate_word_problems("train", num_rows=300, seed=5)
    assert generate_word_problems("train", num_rows=120, seed=5) == long[:120]
    assert generate_word_problems("train", num_rows=300, seed=6) != long
    assert generate_word_problems("train", num_rows=0) == []


def test_chosen_templates_keep_to_the_numbers_of_the_split():
    chosen = TRAIN_TEMPLATES[:4]
    problems = generate_word_problems("validation", num_rows=20, templates=chosen)
    assert {problem.template for problem in problems} == {template.key for template in chosen}
    assert {split_of_operands(problem.operands) for problem in problems} == {"validation"}


def test_written_files(tmp_path: Path):
    paths = write_word_problems(tmp_path / "new" / "data", seed=2, num_train=70, num_validation=9, num_test=11)
    assert {split: path.name for split, path in paths.items()} == {
        "train": "train.jsonl",
        "validation": "validation.jsonl",
        "test": "test.jsonl",
    }
    rows = {split: [json.loads(line) for line in path.read_text().splitlines()] for split, path in paths.items()}
    assert {split: len(lines) for split, lines in rows.items()} == {"train": 70, "validation": 9, "test": 11}
    expected = generate_word_problems("test", num_rows=11, seed=2)
    assert rows["test"] == [problem.as_row() for problem in expected]
    assert list(rows["test"][0]) == ["instruction", "input", "output", "answer"]
    assert rows["test"][0]["input"] == "" and rows["test"][0]["answer"] == str(expected[0].answer)
    assert sorted(file.name for file in (tmp_path / "new" / "data").iterdir()) == sorted(
        path.name for path in paths.values()
    )


def test_nothing_is_written_when_a_size_is_wrong(tmp_path: Path):
    with pytest.raises(UserError, match="num_rows is -1"):
        write_word_problems(tmp_path / "data", num_train=10, num_test=-1)
    assert not (tmp_path / "data").exists()


def test_unknown_split():
    with pytest.raises(UserError, match="'dev'; allowed are 'train', 'validation', 'test'"):
        generate_word_problems("dev", num_rows=1)  # type: ignore[arg-type]


def test_more_rows_than_problems(monkeypatch: pytest.MonkeyPatch):
    tiny = Template("tiny", "add", "What is {a} + {b}?", "{s1}.", ("a + b",), {"a": (2, 4), "b": (2, 4)})
    monkeypatch.setitem(word_problems._TEMPLATES, "train", (tiny,))
    with pytest.raises(UserError, match=r"num_rows is 50, but .* only about [1-9] "):
        generate_word_problems("train", num_rows=50)


def test_number_of_one_takes_the_singular():
    template = Template("t", "add", "{a:child} and {b:box}", "{s1:box}", ("a - b",), {"a": (1, 9), "b": (1, 9)})
    filled = fill(template, {"a": 2, "b": 1}, Random(0))
    assert filled.question == "2 children and 1 box"
    assert filled.output == "2 - 1 = 1 box The answer is 1."
    assert (filled.operands, filled.answer) == ((2, 1), 1)


@pytest.mark.parametrize("expression", ["a / b", "a ^ b"])
def test_evaluate_refuses_what_has_no_integer_result(expression):
    with pytest.raises(ValueError, match="cannot compute 7"):
        evaluate(expression, {"a": 7, "b": 2})
