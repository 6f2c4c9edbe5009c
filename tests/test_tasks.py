"""Tasks as data, their rows from every layout, and twins in the training data."""

import json
import os
from pathlib import Path

import datasets
import pytest

from moa_peft.answers import AnswerFormat
from moa_peft.data import Example, Message, load_examples
from moa_peft.errors import UserError
from moa_peft.tasks import SUITES, TASKS, load_task, select_tasks, train_twins

ADDSUB = [
    {"instruction": "Tom has 3 pens and buys 4. How many?", "input": "", "output": "\nA: It is 7.", "answer": "7.0"},
    {"instruction": "Ann had 9 hats and lost 2. How many?", "input": "", "output": "\nA: It is 7.", "answer": "7.0"},
]
ARC = "Please choose the correct answer to the question: Which is cold?\n\nAnswer1: ice Answer2: fire\n\n"


@pytest.fixture
def real_data() -> Path:
    folder = os.environ.get("MOA_DATA")
    if not folder:
        pytest.skip("needs MOA_DATA, a folder with the question sets of LLM-Adapters")
    return Path(folder)


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(lines, encoding="utf-8")
    return path


def question(text: str, reference: str | None = None, answer: str | None = None) -> Example:
    messages = [Message("user", text)] + ([] if answer is None else [Message("assistant", answer)])
    return Example(messages=tuple(messages), reference=reference, where="rows.json row 8")


def names(words: list[str]) -> list[str]:
    return [task.name for task in select_tasks(words)]


def test_the_suites_are_those_of_the_papers():
    assert SUITES["math"] == ("AddSub", "AQuA", "gsm8k", "MultiArith", "SingleEq", "SVAMP", "mawps")
    assert len(SUITES["commonsense"]) == 8
    assert [name for suite in SUITES.values() for name in suite] == list(TASKS)
    assert {task.format.kind for task in TASKS.values()} == {"number", "letter", "option"}
    assert TASKS["hellaswag"].format.choices == ("ending1", "ending2", "ending3", "ending4")
    assert TASKS["winogrande"].format.choices == ("option1", "option2")
    assert TASKS["AQuA"].format == AnswerFormat(kind="letter", choices=("A", "B", "C", "D", "E"))


def test_selection_takes_names_suites_and_aliases_in_order():
    assert names(["BoolQ", "arc_e", "ARC-c", "obqa", "SIQA", "HellaSwag"]) == [
        "boolq",
        "ARC-Easy",
        "ARC-Challenge",
        "openbookqa",
        "social_i_qa",
        "hellaswag",
    ]
    assert names(["gsm8k", "Math", "addsub"]) == ["gsm8k", *(name for name in SUITES["math"] if name != "gsm8k")]
    assert names(["arc easy", "arc_easy", "social-i-qa", "GSM8K", "svamp", "MAWPS"]) == [
        "ARC-Easy",
        "social_i_qa",
        "gsm8k",
        "SVAMP",
        "mawps",
    ]


def test_unknown_words_name_what_is_close():
    with pytest.raises(UserError, match=r"no task or suite 'hellaswg'\. Did you mean hellaswag\? Suites: math, comm"):
        select_tasks(["math", "hellaswg"])
    with pytest.raises(UserError, match="no task or suite 'comonsense'. Did you mean commonsense"):
        select_tasks(["comonsense"])
    with pytest.raises(UserError, match=r"no task or suite 'zzz'\. Suites: .*Tasks: AddSub, AQuA"):
        select_tasks(["zzz"])
    with pytest.raises(UserError, match="none is given"):
        select_tasks([])


def test_a_row_says_which_labels_it_offers():
    arc = TASKS["ARC-Easy"]
    assert arc.row_choices(question(ARC + "Answer format: answer1/answer2/answer3")) == (
        "answer1",
        "answer2",
        "answer3",
    )
    assert arc.row_choices(question(ARC + "Answer format: answer1/answer2\n")) == ("answer1", "answer2")
    for other in (ARC, "Answer format: answer1/answer2\n\nWhich?", ARC + "Answer format: ending1/ending2"):
        assert arc.row_choices(question(other)) == arc.format.choices
    assert TASKS["gsm8k"].row_choices(question("How many?")) == ()


def test_references():
    assert TASKS["AddSub"].reference(question("q", "118558.0")) == "118558"
    assert TASKS["AddSub"].reference(question("q", answer="3 + 4 = 7. The answer is 7.")) == "7"
    assert TASKS["AQuA"].reference(question("q", "D")) == "D"
    assert TASKS["boolq"].reference(question("q", answer="the correct answer is false")) == "false"
    with pytest.raises(UserError, match=r"AQuA: rows.json row 8 has no answer.* 'F', .* one of A, B, C, D, E"):
        TASKS["AQuA"].reference(question("q", "F"))
    with pytest.raises(UserError, match=r"'answer3', and it must be one of answer1, answer2\."):
        TASKS["ARC-Easy"].reference(question(ARC + "Answer format: answer1/answer2", "answer3"))
    with pytest.raises(UserError, match="answer is None, and it must be a number"):
        TASKS["SVAMP"].reference(question("q"))


@pytest.mark.parametrize(
    "place",
    [
        "AddSub.json",
        "addsub.test.json",
        "math/AddSub.jsonl",
        "Math/ADDSUB.test.json",
        "AddSub/test.json",
        "math/addsub/Test.jsonl",
    ],
)
def test_every_layout_is_found(tmp_path, place):
    write(tmp_path / place, ADDSUB)
    write(tmp_path / "AddSub.train.json", [{**ADDSUB[0], "answer": "train"}])
    write(tmp_path / "AddSub/train.json", [{**ADDSUB[0], "answer": "train"}])
    rows = load_task(TASKS["AddSub"], str(tmp_path))
    assert [row.reference for row in rows] == ["7.0", "7.0"]
    assert rows[1].question == ADDSUB[1]["instruction"]
    assert len(load_task(TASKS["AddSub"], str(tmp_path), limit=1)) == 1


def test_a_file_that_says_test_goes_before_one_that_does_not(tmp_path):
    write(tmp_path / "AddSub.json", ADDSUB)
    write(tmp_path / "AddSub.test.json", ADDSUB[1:])
    assert [row.question for row in load_task(TASKS["AddSub"], str(tmp_path))] == [ADDSUB[1]["instruction"]]


def test_a_missing_file_says_where_it_looked(tmp_path):
    write(tmp_path / "boolq.train.json", ADDSUB)
    write(tmp_path / "boolq" / "train.json", ADDSUB)
    with pytest.raises(UserError) as error:
        load_task(TASKS["boolq"], str(tmp_path))
    for part in ("no test rows of boolq", str(tmp_path), "boolq.test.json", "commonsense/boolq/test.json", ".parquet"):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"data: '.*nowhere' does not exist\. Give a folder"):
        load_task(TASKS["boolq"], str(tmp_path / "nowhere"))
    file = write(tmp_path / "AddSub.json", ADDSUB)
    with pytest.raises(UserError, match=r"AddSub.json' is a file\. Give a folder"):
        load_task(TASKS["AddSub"], str(file))


def test_a_row_without_a_right_answer_is_named(tmp_path):
    write(tmp_path / "AddSub.json", [*ADDSUB, {**ADDSUB[0], "answer": "many", "output": "\nA: Many."}])
    with pytest.raises(UserError, match=r"AddSub: AddSub.json row 3 has no answer .* 'many'"):
        load_task(TASKS["AddSub"], str(tmp_path))
    assert len(load_task(TASKS["AddSub"], str(tmp_path), limit=2)) == 2


def test_a_hub_id_is_asked_for_the_configuration_of_the_task(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ADDSUB)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_task(TASKS["AddSub"], "some-org/llm-adapters")) == 2
    assert asked == [("some-org/llm-adapters", "AddSub", "test")]


def test_twins_differ_in_numbers_only():
    train = [question("Tom has 3 pens and buys 1,200. How many?"), question("Eve eats two figs.")]
    test = [
        question("tom has 12.5 pens, and buys 4! how many"),
        question("Tom has 3 hats and buys 4. How many?"),
        question("Eve eats 15 figs."),
        question("Eve eats figs."),
        question("Everyone has 3 pens."),
    ]
    assert train_twins(test, train) == [True, False, True, False, False]
    assert train_twins([], train) == [] and train_twins(test[:1], []) == [False]


@pytest.mark.real_data
def test_real_rows(real_data):
    counts = {"AddSub": 65, "MultiArith": 109, "SingleEq": 83, "gsm8k": 264, "AQuA": 51}
    counts |= {"boolq": 3269, "ARC-Easy": 2374, "ARC-Challenge": 1172, "openbookqa": 500, "piqa": 1838}
    assert {name: len(load_task(TASKS[name], str(real_data))) for name in counts} == counts
    offered = {len(TASKS["ARC-Easy"].row_choices(row)) for row in load_task(TASKS["ARC-Easy"], str(real_data))}
    assert offered == {3, 4, 5}
    with pytest.raises(UserError, match="no test rows of SVAMP"):
        load_task(TASKS["SVAMP"], str(real_data))


@pytest.mark.real_data
def test_real_twins(real_data):
    train = load_examples(real_data / "math" / "train.json")
    twins = {name: sum(train_twins(load_task(TASKS[name], str(real_data)), train)) for name in ("MultiArith", "AQuA")}
    assert twins == {"MultiArith": 51, "AQuA": 0}
