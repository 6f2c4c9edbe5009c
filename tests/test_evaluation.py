"""Scoring by generation: what is read from a text, counts, intervals, early stopping, and `moa eval`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers import decoders

from moa_peft import MoAConfig
from moa_peft.answers import AnswerFormat
from moa_peft.answers.statements import LONGEST_CORRECTION
from moa_peft.cli import main
from moa_peft.data import Example, load_examples
from moa_peft.data.examples import Message
from moa_peft.errors import UserError
from moa_peft.evaluation import Score, answer_questions, cut_answer
from moa_peft.evaluation.answering import is_over, predict
from moa_peft.evaluation.references import agreeing_rows, reference_answers
from moa_peft.evaluation.selection import select_sets
from moa_peft.intervals import mean_interval, paired_difference, share_interval, wilson_interval
from tests.test_answer_formats import CASES
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer, write_sums

TOKENIZER = tiny_tokenizer()
# Characters are joined without spaces, so that a text survives encoding and decoding.
TOKENIZER.backend_tokenizer.decoder = decoders.Fuse()
NUMBER = AnswerFormat(kind="number")
LETTER = AnswerFormat(kind="letter", choices=("A", "B", "C", "D", "E"))


def question(text: str, reference: str | None = "3", answer: str | None = None) -> Example:
    turns = (Message("user", text),) if answer is None else (Message("user", text), Message("assistant", answer))
    return Example(messages=turns, reference=reference)


class Scripted(torch.nn.Module):
    """A model that answers every prompt with the next of some fixed texts, one character per step, without end."""

    def __init__(self, texts: dict[int, str]):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.generation_config = None
        self.config = tiny_model().config
        self.texts = texts
        self.generated_tokens = 0

    def get_output_embeddings(self) -> None:
        return None

    def generate(self, *, input_ids: Any, generation_config: Any, stopping_criteria: Any = (), **_: Any) -> Any:
        wanted = [TOKENIZER(self.texts[int((row != TOKENIZER.pad_token_id).sum())])["input_ids"] for row in input_ids]
        for position in range(generation_config.max_new_tokens):
            column = [ids[position] if position < len(ids) else ids[-1] for ids in wanted]
            input_ids = torch.cat([input_ids, torch.tensor(column)[:, None]], dim=1)
            self.generated_tokens += 1
            if any(criterion(input_ids, None).all() for criterion in stopping_criteria):
                break
        return input_ids


def test_strict_and_flexible_stand_side_by_side() -> None:
    stated = predict(0, "q", "12", "There are 3 * 4 = 12. The answer is 12.", format=NUMBER)
    assert stated.answers == {"strict": "12", "flexible": "12"} and all(stated.correct.values())
    unstated = predict(1, "q", "12", "3 * 4 = 12", format=NUMBER)
    assert unstated.answers == {"strict": None, "flexible": "12"}
    assert unstated.correct == {"strict": False, "flexible": True}
    wrong = predict(2, "q", "12", "The answer is 11. Or 12.", format=NUMBER)
    assert wrong.answers["strict"] == "11" and not wrong.correct["flexible"]
    letter = predict(3, "q", "C", "A good start. The answer is (C).\nThe answer is (D).", format=LETTER)
    assert letter.answers == {"strict": "C", "flexible": "C"} and letter.output.endswith("(C).")


def test_legacy_reads_the_whole_text() -> None:
    text = "The answer is 12.\n### Instruction:\nWhat is 4 + 5?"
    legacy = predict(0, "q", "12", text, format=NUMBER, legacy=True)
    assert legacy.answers == {"strict": "12", "flexible": "12", "legacy": "5"}
    assert legacy.correct == {"strict": True, "flexible": True, "legacy": False}
    assert legacy.output == text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The answer is 3.\nThe answer is 9.", "The answer is 3."),
        ("First 1.\n\nThen 2.\n\nThe answer is 3.\n\n7 more", "First 1.\n\nThen 2.\n\nThe answer is 3."),
        ("It is 3.\n### Instruction:\nAnother 8?", "It is 3."),
        ("### Response:\n5", "### Response:\n5"),
        ("### Step 1\n2 + 1 = 3\n### Answer\n3\n### Step 2\n5", "### Step 1\n2 + 1 = 3\n### Answer\n3"),
        ("Sure!\n### Input values\nx = 3\n### Response\n4", "Sure!\n### Input values\nx = 3"),
        ("Sure!\n\nQuestion: 2 + 1?\nAnswer: 3\n\nQuestion: 4 + 5?", "Sure!\n\nQuestion: 2 + 1?\nAnswer: 3"),
        ("It is 3.\n### Inputs", "It is 3.\n### Inputs"),
        ("2 + 1 = 3\n#### 3", "2 + 1 = 3\n#### 3"),
        ("The answer is:\n\n**3**\nmore", "The answer is:\n\n**3**"),
        ("no end 3", "no end 3"),
    ],
)
def test_a_text_is_cut_where_the_answer_is_over(text: str, kept: str) -> None:
    assert cut_answer(text, NUMBER) == kept
    if kept != text:
        assert cut_answer(text + " and the answer is 99\n### x", NUMBER) == kept


@pytest.mark.parametrize(
    "text",
    [
        "### Step 1\n2 + 1 = 3\n### Answer:\n3 cats\n### Input:\n5\n### Response:\nThe answer is 9.",
        "Sure!\n\nQuestion: 2 + 1?\nAnswer: 3\n\nQuestion: 4 + 5?\nAnswer: 9",
        "The answer is 5. Wait, no: the answer is 7.\nNo, the answer is 8.\n### Instruction:\nAdd 4 and 5.",
        "The answer is 5.\n\nWait, that is not right.\n3 * 4 = 12.\nThe answer is 12.\nTom has 3.",
        "<think>\nThe answer is 4.\nNo.\n</think>\nThe answer is 5.\nMary has 7.",
        "<think>\nLet me see.\nUser: how many?\nThe answer is 4.\n</think>\nThe answer is 45.\nUser: and then?",
        "The answer is 5." + "\n" * 40,
        "Answer: He sells 9 eggs a day.\nHe makes 9 * 2 = 18.\nThe answer is 18.\nMary has 7.",
    ],
)
def test_what_is_cut_off_once_stays_cut_off(text: str) -> None:
    longer = text + " That is so, and the answer is 99."
    over = [longer[:end] for end in range(len(longer)) if is_over(longer[:end], NUMBER)]
    assert {cut_answer(part, NUMBER) for part in over} == {cut_answer(text, NUMBER)}
    assert len(over[0]) <= len(cut_answer(text, NUMBER)) + LONGEST_CORRECTION


def test_cutting_a_text_changes_no_answer() -> None:
    for case in CASES:
        format = AnswerFormat(kind=case["kind"], choices=tuple(case["choices"]))
        reference = case["choices"][0] if case["choices"] else "1"
        answers = predict(0, "q", reference, case["text"], format=format).answers
        assert answers == {mode: case[mode] for mode in ("strict", "flexible")}, case["text"]


@pytest.mark.parametrize("text", ["1,5", "3:30", "12 apples in 3 boxes", "10-3", "1 or 2", "none"])
def test_a_right_answer_is_one_number(text: str) -> None:
    assert NUMBER.reference(text) is None
    with pytest.raises(UserError, match="no number"):
        reference_answers([Example(messages=(Message("user", "q"),), reference=text, where="row 1")], NUMBER)


def test_right_answers_are_read_in_every_spelling() -> None:
    texts = ["118558.0", "$1,200", "-3", "1/2", "12 apples", "twelve", "5 + 4 = 9.\n#### 9", r"\frac{1}{2}", "50%"]
    assert [NUMBER.reference(text) for text in texts] == ["118558", "1200", "-3", "0.5", "12", "12", "9", "0.5", "50"]
    assert NUMBER.reference("3 + 4 = 7", is_worked=True) == "7"


def test_counts_follow_the_predictions() -> None:
    texts = ["The answer is 3.", "maybe 3", "nothing", "The answer is 4."]
    score = Score([predict(index, "q", "3", text, format=NUMBER) for index, text in enumerate(texts)])
    strict, flexible = score.accuracy("strict"), score.accuracy("flexible")
    assert (score.num_items, strict.correct, flexible.correct) == (4, 1, 2)
    assert (strict.missing, flexible.missing) == (2, 1)
    assert strict.value == 0.25
    assert score.to_dict()["strict"]["interval_95"]["low"] == strict.interval.low


def test_intervals_are_bootstrap_and_wilson_at_the_ends() -> None:
    correct = [True] * 30 + [False] * 70
    interval = share_interval(correct)
    # The share is binomial under resampling: its 2.5 % and 97.5 % quantiles, to the error of 10,000 draws.
    from scipy.stats import binom

    assert interval.low == pytest.approx(binom.ppf(0.025, 100, 0.3) / 100, abs=0.011)
    assert interval.high == pytest.approx(binom.ppf(0.975, 100, 0.3) / 100, abs=0.011)
    assert share_interval(correct) == interval
    assert share_interval([False] * 20) == wilson_interval(0, 20) and share_interval([False] * 20).high > 0.1
    values = [float(value) for value in range(50)]
    spread = mean_interval(values)
    half = 1.96 * (sum((value - 24.5) ** 2 for value in values) / 50) ** 0.5 / 50**0.5
    assert spread.low == pytest.approx(24.5 - half, rel=0.03) and spread.high == pytest.approx(24.5 + half, rel=0.03)
    assert (mean_interval([2.0, 2.0]).low, mean_interval([2.0, 2.0]).high) == (2.0, 2.0)


def test_wilson_interval_by_its_formula() -> None:
    z, k, n = 1.959963984540054, 7, 40
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    interval = wilson_interval(k, n)
    assert interval.low == pytest.approx(centre - half) and interval.high == pytest.approx(centre + half)


def test_paired_difference_uses_the_pairs() -> None:
    """The example of Newcombe's paper (pairs 36, 12, 2, 0): 0.20 with 0.0569 to 0.3404 (method 10)."""
    first = [True] * 48 + [False] * 2
    second = [True] * 36 + [False] * 12 + [True] * 2
    difference, interval = paired_difference(second, first)
    assert difference == pytest.approx(0.20)
    assert (interval.low, interval.high) == (pytest.approx(0.0569, abs=1e-4), pytest.approx(0.3404, abs=1e-4))
    agreeing, apart = [True] * 30 + [False] * 30, [False] * 30 + [True] * 30
    _, narrow = paired_difference(agreeing, agreeing)
    _, wide = paired_difference(agreeing, apart)
    assert narrow.high - narrow.low < wide.high - wide.low


def test_generation_ends_once_every_row_is_over() -> None:
    examples = [question("1+2"), question("10+2", "12")]
    lengths = [len(prompt) for prompt in _prompts(examples)]
    texts = {lengths[0]: "The answer is 3.\nWhat next? " * 3, lengths[1]: "So\n\nThe answer is 12.\n" + "x" * 50}
    model = Scripted(texts)
    options: dict[str, Any] = {"format": NUMBER, "template": "alpaca", "max_new_tokens": 60}
    predictions = answer_questions(model, TOKENIZER, examples, **options)
    assert [prediction.output for prediction in predictions] == ["The answer is 3.", "So\n\nThe answer is 12."]
    assert predictions == [
        predict(index, example.question, number, texts[length], format=NUMBER)
        for index, (example, number, length) in enumerate(zip(examples, ("3", "12"), lengths, strict=True))
    ]
    assert model.generated_tokens == len("So\n\nThe answer is 12.") + LONGEST_CORRECTION
    model.generated_tokens = 0
    predictions = answer_questions(model, TOKENIZER, examples, legacy=True, **options)
    assert model.generated_tokens == 60 and predictions[0].answers["legacy"] == "3"


def test_predictions_keep_the_order_of_the_questions() -> None:
    model = get_peft_model(tiny_model(), MoAConfig.soft(rank=2, task_type="CAUSAL_LM"))
    examples = [question(f"{a}+2", str(a + 2)) for a in range(5)]
    options: dict[str, Any] = {"format": NUMBER, "template": "alpaca", "max_new_tokens": 12, "batch_size": 2}
    batches: list[list[int]] = []
    predictions = answer_questions(
        model, TOKENIZER, examples, **options, on_batch=lambda batch: batches.append([p.index for p in batch])
    )
    assert [p.question for p in predictions] == [e.question for e in examples]
    assert [p.reference for p in predictions] == ["2", "3", "4", "5", "6"]
    assert [len(batch) for batch in batches] == [2, 2, 1] and sorted(sum(batches, [])) == [0, 1, 2, 3, 4]
    some = answer_questions(model, TOKENIZER, examples, **options, indices=[4, 1])
    assert some == [predictions[1], predictions[4]]


def test_references_come_from_the_row_or_its_answer() -> None:
    assert reference_answers([question("q", "1,200"), question("q", None, "The answer is 7.")], NUMBER) == [
        "1200",
        "7",
    ]
    with pytest.raises(UserError, match="no number"):
        reference_answers([question("q", "blue")], NUMBER)
    with pytest.raises(UserError, match="no questions"):
        reference_answers([], NUMBER)


def test_written_out_answers_that_are_wrong_are_left_out() -> None:
    examples = [
        question("q", "3", "1 + 2 = 3. The answer is 3."),
        question("q", "58", "95 - 6 = 89. The answer is 89."),
        question("q", "3", None),
        question("q", "3", "It makes 3"),
    ]
    assert agreeing_rows(examples, NUMBER) == [0, 3]


def _prompts(examples: list[Example]) -> list[list[int]]:
    from moa_peft.data import render_prompt

    return [render_prompt(example, TOKENIZER, template="alpaca") for example in examples]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "base")
    write_sums(folder / "sums.json", rows=6)
    (folder / "other").mkdir()
    write_sums(folder / "other" / "sums.json", rows=3)
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(base, MoAConfig.sparse(rank=2, task_type="CAUSAL_LM")).save_pretrained(str(folder / "adapter"))
    return folder


def test_eval_writes_results_and_predictions(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "results"
    words = ["--data", str(files / "sums.json"), "--data", str(files / "other" / "sums.json")]
    settings = ["--output", str(out), "--max-new-tokens", "4", "--limit", "5"]
    assert main(["eval", str(files / "adapter"), *words, *settings]) == 0
    shown = capsys.readouterr().out
    name = f"{files.name}-sums"
    assert name[:12] in shown and "other-sums" in shown
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "complete" and results["settings"]["kind"] == "adapter"
    assert results["sets"][name]["generate"]["num_items"] == 5
    assert results["sets"]["other-sums"]["generate"]["num_items"] == 3
    assert results["settings"]["template"] == "alpaca" and results["versions"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (out / f"{name}.generate.jsonl").read_text().splitlines()]
    examples = load_examples(files / "sums.json")
    by_index = {line["index"]: line["question"] for line in lines}
    assert by_index == {index: example.question for index, example in enumerate(examples[:5])}
    assert sorted(file.name for file in out.parent.iterdir()) == ["results"]
    again = ["eval", str(files / "base"), *words[:2], *settings]
    assert main(again) == 2
    message = capsys.readouterr().err
    assert "--overwrite" in message and "kind: 'adapter' -> 'base model'" in message
    assert json.loads((out / "results.json").read_text()) == results
    assert main([*again, "--overwrite"]) == 0
    assert sorted(file.name for file in out.iterdir()) == [".lock", "results.json", "sums.generate.jsonl"]
    assert json.loads((out / "results.json").read_text())["settings"]["kind"] == "base model"


def test_files_in_the_layout_of_the_collection_are_their_tasks(tmp_path: Path) -> None:
    for name in ("AddSub", "gsm8k"):
        (tmp_path / name).mkdir()
        rows = [{"instruction": "1+1", "input": "", "output": "The answer is 2.", "answer": "2"}]
        (tmp_path / name / "test.json").write_text(json.dumps(rows))
    files = [str(tmp_path / name / "test.json") for name in ("AddSub", "gsm8k")]
    assert [(found.name, found.task.name) for found in select_sets([], files)] == [
        ("AddSub", "AddSub"),
        ("gsm8k", "gsm8k"),
    ]
    odd = [{"instruction": "Which?\n\nAnswer format: answer1/answer2", "output": "x", "answer": "answer5"}]
    (tmp_path / "ARC-Easy.json").write_text(json.dumps(odd))
    with pytest.raises(UserError, match="row 1 has no answer to compare with: its answer is 'answer5'"):
        select_sets([], [str(tmp_path / "ARC-Easy.json")])
    with pytest.raises(UserError, match="--train: twins"):
        option = [{"instruction": "Which?\n\nAnswer format: true/false", "output": "x", "answer": "true"}]
        (tmp_path / "boolq.json").write_text(json.dumps(option))
        select_sets([], [str(tmp_path / "boolq.json")], train=files[0])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data", "missing.json"], "missing.json"),
        ([], "nothing to score"),
        (["--data", "{files}/sums.json", "--template", "alpacca"], "--template"),
        (["--data", "{files}/sums.json", "--dtype", "int7"], "--dtype"),
        (["--data", "{files}/sums.json", "--batch-size", "0"], "batch_size"),
        (["--data", "{files}/sums.json", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--data", "{files}/sums.json", "--limit", "0"], "limit"),
        (["--data", "{files}/sums.json", "--base", "x"], "--base"),
        (["--data", "{files}/sums.json", "--data", "{files}/sums.json"], "twice|both be called"),
        (["--data", "{files}/sums.json", "--output", "{files}/sums.json"], "is a file"),
        (["--data", "{files}/sums.json", "--output", "{files}", "--overwrite"], "more than results"),
        (["--data", "{files}/words.json"], "must be a number"),
        (["--data", "{files}/sums.json", "--scoring", "guess"], "scoring: guess"),
        (["--data", "{files}/sums.json", "--scoring", "loglikelihood"], "are numbers"),
        (["--data", "{files}"], "is a folder"),
        (["--tasks", "mathe", "--data", "{files}"], "mathe"),
        (["--tasks", ",", "--data", "{files}"], "nothing to score"),
        (["--harness", ","], "nothing to score"),
        (["--data", "{files}/sums.json", "--scoring", "nll,nll"], "given twice"),
        (["--data", "{files}/sums.json", "--samples", "3"], "--samples is for humaneval and mbpp"),
        (["--data", "{files}/sums.json", "--temperature", "0.5"], "--temperature is for"),
        (["--data", "{files}/sums.json", "--execute-code"], "--execute-code is for"),
        (["--data", "{files}/sums.json", "--num-fewshot", "0"], "--num-fewshot is for --harness"),
        (["--data", "{files}/sums.json", "--include-path", "x"], "--include-path is for --harness"),
        (["--data", "{files}/sums.json", "--scoring", "nll", "--legacy"], "--legacy is for generated answers"),
        (["--harness", "gsm8k", "--max-new-tokens", "5"], "--max-new-tokens is for"),
        (["--harness", "gsm8k", "--train", "x.json"], "--train is for"),
        (["--tasks", "code", "--data", "org/name", "--execute-code"], "are several"),
        (["--tasks", "humaneval+", "--data", "{files}", "--execute-code"], "is for humaneval and mbpp"),
        (["--tasks", "human-eval", "--data", "{files}", "--execute-code", "--temperature", "0"], "temperature: 0"),
        (["--tasks", "humaneval", "--data", "{files}", "--execute-code", "--pass-at", "\u00b2"], "--pass-at"),
        (["--tasks", "AddSub", "--data", "{files}"], "AddSub"),
    ],
)
def test_eval_refuses(files: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str) -> None:
    (files / "words.json").write_text(json.dumps([{"instruction": "colour?", "input": "", "output": "blue"}]))
    before = sorted(files.rglob("*"))
    assert main(["eval", str(files / "base"), *(word.replace("{files}", str(files)) for word in words)]) == 2
    shown = capsys.readouterr()
    assert any(part in shown.err for part in named.split("|")), shown.err
    assert "Traceback" not in shown.err
    assert sorted(files.rglob("*")) == before


def test_eval_refuses_what_is_no_model(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(files / "nowhere"), "--data", str(files / "sums.json")]) == 2
    assert "nowhere" in capsys.readouterr().err
