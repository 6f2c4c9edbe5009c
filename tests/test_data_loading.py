"""Rows from files, folders and the hub become the same examples; what is wrong with them is said."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from moa_peft.data import Message, load_examples
from moa_peft.errors import UserError

ROWS = [
    {"instruction": "Two plus two?", "input": "", "output": "\nA: It is 4.", "answer": "4.0"},
    {"instruction": "Add.", "input": "3 and 5", "output": "\nRationale: 3 + 5 = 8", "answer": 8},
]


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["array", "data", "jsonl", "parquet", "folder"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path, kind):
    path = tmp_path / {"jsonl": "rows.jsonl", "parquet": "rows.parquet"}.get(kind, "rows.json")
    rows = [{**row, "answer": str(row["answer"])} for row in ROWS]
    if kind == "jsonl":
        write(path, "\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\n")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(path, {"version": 1, "data": rows} if kind == "data" else rows)

    examples = load_examples(tmp_path if kind == "folder" else path)

    assert [example.messages for example in examples] == [
        (Message("user", "Two plus two?"), Message("assistant", "It is 4.")),
        (Message("user", "Add.\n\n3 and 5"), Message("assistant", "Rationale: 3 + 5 = 8")),
    ]
    assert examples[1].source == {"instruction": "Add.", "input": "3 and 5"}
    assert [example.reference for example in examples] == ["4.0", "8"]
    # Blank lines of a .jsonl file count as lines, so that the number leads to the place in an editor.
    assert examples[1].where == f"{path.name} line 3" if kind == "jsonl" else f"{path.name} row 2"


def test_only_a_mark_after_a_line_break_is_stripped(tmp_path):
    outputs = ["\nA: She played", " \n A:She", "A: the first", "\n\n    return 1", "plain", "AA: x"]
    rows = [{"instruction": "q", "output": output} for output in outputs]
    answers = [example.answer for example in load_examples(write(tmp_path / "rows.json", rows))]
    assert answers == ["She played", "She", "A: the first", "    return 1", "plain", "AA: x"]


def test_prompt_completion_and_messages(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    final = {"role": "assistant", "content": "2"}
    texts = load_examples(write(tmp_path / "a.json", [{"prompt": "One?", "completion": "\nA: 1", "id": 7}]))[0]
    lists = load_examples(write(tmp_path / "b.json", [{"prompt": turns, "completion": [final], "answer": True}]))[0]
    chat = load_examples(write(tmp_path / "c.json", [{"messages": [*turns, final], "prompt": "extra column"}]))[0]

    # Only LLM-Adapters' outputs have the mark; a completion is taken as it stands.
    assert texts.messages == (Message("user", "One?"), Message("assistant", "\nA: 1"))
    assert lists.messages == chat.messages and len(chat.messages) == 5
    assert (lists.num_context, chat.num_context) == (4, 0)
    assert lists.reference == "true" and chat.reference is None
    assert chat.question == "One?\nTwo?" and chat.answer == "2" and len(chat.prompt_messages) == 4


def test_prompt_only_rows_need_require_answer_false(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"prompt": "One?", "answer": "1", "completion": null}\n')
    with pytest.raises(UserError, match=r"rows.jsonl line 1 .*completion \(null\).*completion is missing"):
        load_examples(path)
    example = load_examples(path, require_answer=False)[0]
    assert example.answer is None and example.reference == "1" and example.question == "One?"


def test_null_columns_count_as_absent(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"instruction": "q", "input": None, "output": "a", "messages": None, "answer": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert load_examples(path)[0].source == {"instruction": "q", "input": ""}


def test_folder_takes_the_files_of_the_split(tmp_path):
    for name in ("boolq.train", "boolq.test", "train-00000-of-00001", "extra", "dev"):
        write(tmp_path / f"{name}.json", [{"instruction": name, "output": "a"}])
    write(tmp_path / "README.md", "not data")
    questions = {split: [e.question for e in load_examples(tmp_path, split=split)] for split in ("train", "test")}
    assert questions == {"train": ["boolq.train", "train-00000-of-00001"], "test": ["boolq.test"]}
    assert load_examples(tmp_path, split="validation")[0].question == "dev"
    assert load_examples(tmp_path, split="test")[0].split == "test"
    for name in ("boolq.train", "train-00000-of-00001"):
        (tmp_path / f"{name}.json").unlink()
    assert [e.question for e in load_examples(tmp_path)] == ["extra"]
    with pytest.raises(UserError, match=r"split=train_sft.*boolq.test.json, dev.json, extra.json"):
        load_examples(tmp_path, split="train_sft")


def test_limit_stops_reading(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"instruction": "q", "output": "a"}\nbroken\n')
    assert len(load_examples(path, limit=1)) == 1
    for limit in (0, -1, True, 2.0):
        with pytest.raises(UserError, match="limit="):
            load_examples(path, limit=limit)


GOOD = {"instruction": "q", "output": "a"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "no file or folder .*none.json.*hub id of the form org/name"),
        ("data.csv", "a,b", "unknown kind.*json, .jsonl, .parquet"),
        ("zero.json", "", r"empty \(0 bytes\)"),
        ("blank.json", " \n", "is empty"),
        ("rows.json", [], "has no rows"),
        ("rows.jsonl", "\n\n", "has no rows"),
        ("rows.json", '[{"instruction": "q"},\n {"output" "a"}]', "not valid JSON: line 2, column"),
        ("rows.json", '{"instruction": "q"}\n{"instruction": "r"}', "rename the file to end in .jsonl"),
        ("rows.jsonl", '{"instruction": "q", "output": "a"}\n{"instruction": \n', "JSON Lines: line 2, column"),
        ("rows.json", {"rows": []}, "found an object with the keys rows"),
        ("rows.json", [GOOD, "text"], "row 2: a row must be an object.*not text"),
        ("rows.json", [{"question": "q", "solution": "a"}], "row 1 .*found: question, solution. Accepted forms: .*"),
        ("rows.json", [GOOD, {"prompt": "q", "completion": "a"}], "row 2 is of the prompt form.*instruction form"),
        ("rows.json", [{**GOOD, "prompt": "q", "completion": "a"}], "fits 2 forms at once"),
        ("rows.json", [{"instruction": "q", "output": 3}], "row 1: output must be text"),
        ("rows.json", [{"instruction": " ", "output": "a"}], "instruction and input are empty"),
        ("rows.json", [{"prompt": "", "completion": "a"}], "prompt is empty"),
        ("rows.json", [{"prompt": "q", "completion": []}], "prompt is text and completion is a list"),
        ("rows.json", [{**GOOD, "answer": ["a"]}], "answer must be text, a number"),
        ("rows.json", [{"messages": []}], "messages must be a list"),
        ("rows.json", [{**GOOD, "input": "\ud800"}], r"row 1: input has \\ud800 at position 1"),
        ("rows.json", [{**GOOD, "answer": "1\udfff"}], r"row 1: answer has \\udfff at position 2"),
        ("rows.json", [{"prompt": "\ud800", "completion": "a"}], r"row 1: prompt has \\ud800"),
        (
            "rows.jsonl",
            '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            r"message 1 of messages: content has",
        ),
        (
            "rows.json",
            [{"messages": [{"role": "human", "content": "q"}]}],
            "'human'; allowed: system, user, assistant",
        ),
        ("rows.json", [{"messages": [{"role": "user", "content": [1]}]}], "content must be text, not a list"),
        ("rows.json", [{"messages": [{"role": "user", "content": "q", "name": "x"}]}], "only role and content"),
        ("rows.json", [{"messages": [{"role": "user", "content": "q"}]}], "last message must be by the assistant"),
        ("rows.json", [{"messages": [{"role": "assistant", "content": "a"}]}], "needs a user message before"),
        ("rows.parquet", "PAR1 but not really", "not a readable Parquet file"),
        ("rows.json", f'[{{"instruction": "q", "output": "a", "answer": {"9" * 5000}}}]', "cannot be read as JSON"),
        ("rows.jsonl", "[" * 100_000, "cannot be read as JSON in line 1"),
    ],
)
def test_bad_data_says_what_is_wrong_and_where(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(UserError, match=message):
        load_examples(path)


def test_other_encodings_and_empty_folders(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes('[{"instruction": "caf\u00e9", "output": "a"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_examples(path)
    path.unlink()
    with pytest.raises(UserError, match="has no .json, .jsonl, .parquet file"):
        load_examples(tmp_path)
    with pytest.raises(UserError, match="path of the data is empty"):
        load_examples("")


def test_hub_id_goes_to_datasets_with_config_and_split(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{**ROWS[0], "extra": 1}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load_examples("org/name:main", split="test", limit=2)
    assert calls == [(("org/name", "main"), {"split": "test"})]
    assert [example.where for example in examples] == ["org/name:main test row 1", "org/name:main test row 2"]
    assert examples[0].answer == "It is 4." and examples[0].split == "test"


@pytest.mark.parametrize(("offline", "advice"), [(True, "HF_HUB_OFFLINE"), (False, "Check the spelling")])
def test_hub_id_that_cannot_be_reached(monkeypatch, offline, advice):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: offline)
    with pytest.raises(UserError, match=f"no local file or folder.*Couldn't reach.*{advice}"):
        load_examples("org/name")
    # A path with a data suffix is a missing file, never a download.
    with pytest.raises(UserError, match="There is no file or folder data/train.json"):
        load_examples("data/train.json")
