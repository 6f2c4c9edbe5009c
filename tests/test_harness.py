"""Tasks of lm-evaluation-harness on an adapter: likelihoods and texts are the model's own, offline."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import GenerationConfig

from moa_peft import MoAConfig
from moa_peft.cli import main
from moa_peft.errors import UserError
from moa_peft.generation import generate_texts
from moa_peft.harness import (
    _DEFAULT_NEW_TOKENS,
    _built_in_manager,
    check_harness_tasks,
    load_harness_tasks,
    run_harness,
)
from moa_peft.harness_results import HarnessResult, HarnessScore
from tests.matrix import randomise_adapter
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'moa-peft[eval]'")

TOKENIZER = tiny_tokenizer()
QUESTIONS = [
    {"question": f"{a}+{b}=", "options": [str(a + b), str(a + b + 1), "none of them"], "gold": a % 3, "answer": "?"}
    for a, b in ((1, 2), (34, 4), (10, 20), (7, 8), (100, 2), (5, 55555))
]
CHOICE = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
NO_EXAMPLES = CHOICE | {"task": "tiny_fixed", "num_fewshot": 0}
WRITING = {
    "task": "tiny_writing",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def write_tasks(folder: Path, *tasks: dict[str, Any]) -> str:
    """A folder with task definitions, their questions beside it."""
    rows = folder / "questions.json"
    rows.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "target_delimiter": "",
        "metadata": {"version": 2.5},
    }
    place = folder / "definitions"
    place.mkdir()
    for task in tasks:
        (place / f"{task['task']}.yaml").write_text(yaml.safe_dump({**source, **task}), encoding="utf-8")
    return str(place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tasks(tmp_path_factory.mktemp("tasks"), CHOICE, NO_EXAMPLES, WRITING)


@pytest.fixture
def built_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A few of the definitions that come with the harness, in place of all fourteen thousand."""
    from lm_eval.tasks import manager

    place = Path(manager.__file__).parent / "arc"
    assert (place / "arc_easy.yaml").is_file()
    monkeypatch.setattr(manager, "__file__", str(place / "manager.py"))
    _built_in_manager.cache_clear()
    yield place
    _built_in_manager.cache_clear()


def run(model: Any, tokenizer: Any, tasks: list[str], *, include_path: str, **options: Any) -> HarnessResult:
    return run_harness(model, tokenizer, load_harness_tasks(tasks, include_path=include_path), **options)


def adapted(**knobs: Any) -> Any:
    model = get_peft_model(tiny_model(), MoAConfig.soft(rank=2, task_type="CAUSAL_LM", **knobs))
    randomise_adapter(model)
    return model.eval()


def log_likelihood(model: Any, prompt: str, answer: str, **arguments: Any) -> tuple[float, bool]:
    """Sum over the answer's tokens, from one forward without padding, and whether greedy decoding writes them."""
    ids, num_prompt = TOKENIZER(prompt + answer)["input_ids"], len(TOKENIZER(prompt)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]), **arguments).logits[0, num_prompt - 1 :].double()
    tokens = torch.tensor(ids[num_prompt:])
    picked = logits.log_softmax(-1).gather(-1, tokens[:, None])
    return float(picked.sum()), bool((logits.argmax(-1) == tokens).all())


def likelihoods(result: HarnessResult) -> list[tuple[float, bool]]:
    """Those of all options of all questions, in order."""
    return [tuple(response[0]) for sample in result.samples["tiny_choice"] for response in sample["resps"]]


def expected_likelihoods(model: Any) -> list[tuple[float, bool]]:
    return [log_likelihood(model, row["question"], option) for row in QUESTIONS for option in row["options"]]


def texts(result: HarnessResult) -> list[str]:
    return [sample["resps"][0][0] for sample in result.samples["tiny_writing"]]


def assert_close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5, abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_are_those_of_a_forward(folder: str, batch_size: int) -> None:
    model = adapted()
    found = run(model, TOKENIZER, ["tiny_choice"], include_path=folder, batch_size=batch_size)
    expected = expected_likelihoods(model)
    assert_close(likelihoods(found), expected)
    best = [max(range(3), key=lambda option: expected[3 * row + option][0]) for row in range(len(QUESTIONS))]
    accuracy = sum(option == row["gold"] for option, row in zip(best, QUESTIONS)) / len(QUESTIONS)
    assert found.scores["tiny_choice"]["acc,none"].value == pytest.approx(accuracy)
    with model.disable_adapter():
        base = run(model, TOKENIZER, ["tiny_choice"], include_path=folder, batch_size=batch_size)
        assert_close(likelihoods(base), expected_likelihoods(model))
    assert not torch.allclose(torch.tensor(likelihoods(base)), torch.tensor(likelihoods(found)), atol=0.1)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_adapter_that_routes_by_the_prompt_is_told_the_prompt(folder: str, batch_size: int) -> None:
    model = adapted(granularity="sequence")
    result = run(model, TOKENIZER, ["tiny_choice"], include_path=folder, batch_size=batch_size)
    expected, unaware = [], []
    for row in QUESTIONS:
        for option in row["options"]:
            prompt, whole = (len(TOKENIZER(text)["input_ids"]) for text in (row["question"], row["question"] + option))
            mask = torch.tensor([[1] * prompt + [0] * (whole - prompt - 1)])
            expected.append(log_likelihood(model, row["question"], option, prompt_mask=mask))
            unaware.append(log_likelihood(model, row["question"], option))
    assert_close(likelihoods(result), expected)
    assert not torch.allclose(torch.tensor(unaware), torch.tensor(expected), atol=1e-2)


def test_half_precision_is_summed_in_full(folder: str) -> None:
    model = adapted().to(torch.bfloat16)
    found = run(model, TOKENIZER, ["tiny_choice"], include_path=folder, batch_size=1)
    assert_close(likelihoods(found), expected_likelihoods(model))


def test_the_likelihood_of_a_whole_text_follows_the_begin_token(tmp_path: Path) -> None:
    """The begin token is the prompt, by which an adapter that routes by the prompt routes."""
    rolling = {"task": "tiny_text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "target_delimiter": ""}
    metrics = {"metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]}
    include = write_tasks(tmp_path, {**rolling, "doc_to_target": "{{question}}", **metrics})
    model = adapted(granularity="sequence")
    found = run(model, TOKENIZER, ["tiny_text"], include_path=include, limit=3)
    for sample, row in zip(found.samples["tiny_text"], QUESTIONS):
        mask = torch.tensor([[1] + [0] * (len(row["question"]) - 1)])
        expected, _ = log_likelihood(model, "<s>", row["question"], prompt_mask=mask)
        assert sample["resps"][0][0] == pytest.approx(expected, abs=1e-4)
    score = found.scores["tiny_text"]["bits_per_byte,none"]
    assert score.value > 1 and score.stderr is None and score.interval is None


def test_a_text_too_long_for_the_model_keeps_its_end_and_its_prompt(tmp_path: Path) -> None:
    include = write_tasks(tmp_path, CHOICE)
    model = get_peft_model(
        tiny_model(max_position_embeddings=14), MoAConfig.soft(granularity="sequence", task_type="CAUSAL_LM")
    )
    randomise_adapter(model)
    found = run(model.eval(), TOKENIZER, ["tiny_choice"], include_path=include)
    prompt, answer = QUESTIONS[5]["question"], QUESTIONS[5]["options"][2]
    kept = prompt[-(14 - len(answer) + 1) :]
    assert 0 < len(kept) < len(prompt)
    mask = torch.tensor([[1] * len(kept) + [0] * (len(answer) - 1)])
    assert_close(likelihoods(found)[-1:], [log_likelihood(model, kept, answer, prompt_mask=mask)])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_are_those_of_generation(tmp_path: Path, batch_size: int) -> None:
    """Without the prompt expert, whose unrotated keys depend on absolute positions."""
    model = adapted(prompt=False)
    prompts = [TOKENIZER(row["question"])["input_ids"] for row in QUESTIONS]
    free = generate_texts(model, TOKENIZER, prompts, max_new_tokens=12, batch_size=1)
    mark = max(free, key=len)[4]
    include = write_tasks(tmp_path, WRITING | {"generation_kwargs": {"until": [mark], "max_gen_toks": 12}})
    hostile = GenerationConfig(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, eos_token_id=2)
    model.generation_config = model.get_base_model().generation_config = hostile
    found = run(model, TOKENIZER, ["tiny_writing"], include_path=include, batch_size=batch_size)
    assert texts(found) == [text.split(mark)[0] for text in free]
    assert len(set(texts(found))) > 1 and texts(found) != free
    assert model.generation_config is hostile and model.get_base_model().generation_config is hostile


def test_texts_end_at_the_end_tokens_of_the_base(folder: str) -> None:
    model = adapted()
    first = texts(run(model, TOKENIZER, ["tiny_writing"], include_path=folder, batch_size=1))
    end = TOKENIZER(first[0])["input_ids"][2]
    model.generation_config.eos_token_id = [2, end]
    ended = texts(run(model, TOKENIZER, ["tiny_writing"], include_path=folder, batch_size=1))
    assert ended[0] == first[0][: first[0].index(str(TOKENIZER.decode([end]))) + 1] != first[0]


def test_the_same_as_the_harness_by_itself(folder: str) -> None:
    """Prompts with worked examples, their order, metrics and their errors."""
    from lm_eval import evaluator
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager

    plain_lm: Any = huggingface.HFLM
    model = adapted()
    tasks = ["tiny_choice", "tiny_writing", "tiny_fixed"]
    found = run(model, TOKENIZER, tasks, include_path=folder, num_fewshot=2, seed=7, limit=4)
    with pytest.MonkeyPatch.context() as patch:
        # It describes the machine, with programs that take seconds.
        patch.setattr(evaluator, "add_env_info", lambda storage: None)
        own: Any = evaluator.simple_evaluate(
            plain_lm(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=8),
            tasks=[*tasks],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            num_fewshot=2,
            limit=4,
            random_seed=7,
            numpy_random_seed=7,
            torch_random_seed=7,
            fewshot_random_seed=7,
        )
    for task in tasks:
        pairs = list(zip(found.samples[task], own["samples"][task], strict=True))
        assert all(left["prompt_hash"] == right["prompt_hash"] for left, right in pairs)
        examples = 0 if task == "tiny_fixed" else 2
        assert all(left["arguments"][0][0].count("=") == examples + 1 for left, _ in pairs)
        assert found.configs[task]["num_fewshot"] == own["configs"][task]["num_fewshot"] == examples
        for key, score in found.scores[task].items():
            metric, name = key.split(",")
            assert score.value == own["results"][task][key]
            assert score.stderr == own["results"][task][f"{metric}_stderr,{name}"]
    assert found.n_samples == own["n-samples"]
    assert {key: found.versions[key] for key in tasks} == own["versions"] == dict.fromkeys(tasks, 2.5)


def test_results_are_ready_for_a_table_and_for_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted().train()
    tasks = ["tiny_choice", "tiny_writing"]
    result = run(model, TOKENIZER, tasks, include_path=folder, limit=4)
    assert capsys.readouterr().out == ""
    assert model.training
    assert result.n_samples == {task: {"original": 6, "effective": 4} for task in tasks}
    content = result.to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert json.loads(json.dumps(result.samples, allow_nan=False)) == result.samples
    score = content["scores"]["tiny_choice"]["acc,none"]
    assert score["interval_95"]["high"] - score["value"] == pytest.approx(1.96 * score["stderr"])
    rows = result.rows()
    assert [row["metric"] for row in rows] == ["acc", "acc_norm", "exact_match"]
    assert {row["questions"] for row in rows} == {4}
    assert rows[0]["value"] == score["value"] and rows[0]["num_fewshot"] == 0 and rows[0]["version"] == 2.5
    endless = replace(result, scores={"task": {"ppl,none": HarnessScore(value=float("nan"), stderr=None)}})
    assert endless.to_dict()["scores"]["task"] == {"ppl,none": {"value": None, "stderr": None, "interval_95": None}}
    share = run(model, TOKENIZER, tasks[:1], include_path=folder, limit=0.5, log_samples=False)
    assert share.n_samples["tiny_choice"]["effective"] == 3 and share.samples == {}


def test_what_the_harness_prints_goes_to_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    median = [{"metric": "acc", "aggregation": "median", "higher_is_better": True}]
    include = write_tasks(tmp_path, CHOICE | {"metric_list": median})
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    run(adapted(), TOKENIZER, ["tiny_choice"], include_path=include, limit=3)
    captured = capsys.readouterr()
    assert captured.out == "" and "bootstrapping" in captured.err


def test_the_tokenizer_of_the_caller_is_left_alone(folder: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    run(adapted(), tokenizer, ["tiny_writing"], include_path=folder, limit=2)
    assert tokenizer.pad_token is None and tokenizer.padding_side == "right"


def test_chat_prompts(folder: str) -> None:
    found = run(adapted(), TOKENIZER, ["tiny_writing"], include_path=folder, apply_chat_template=True, limit=1)
    assert found.samples["tiny_writing"][0]["arguments"][0][0] == "<user>1+2=<assistant>"
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="chat"):
        run(adapted(), bare, ["tiny_writing"], include_path=folder, apply_chat_template=True)


def test_groups_and_their_members(tmp_path: Path, built_in: Path) -> None:
    include = write_tasks(tmp_path, CHOICE, {**CHOICE, "task": "tiny_turned", "doc_to_text": "{{answer}}{{question}}"})
    group = {
        "group": "tiny_both",
        "task": ["tiny_choice", "tiny_turned"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}],
        "metadata": {"version": 3},
    }
    (Path(include) / "group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    scores = run(adapted(), TOKENIZER, ["tiny_both"], include_path=include).scores
    members = [scores[name]["acc,none"].value for name in group["task"]]
    assert scores["tiny_both"]["acc,none"].value == pytest.approx(sum(members) / 2)


def test_unknown_tasks_are_refused_with_those_of_similar_names(folder: str, built_in: Path) -> None:
    check_harness_tasks(["arc_easy", "ai2_arc"])
    check_harness_tasks(["arc_easy", "tiny_choice"], include_path=folder)
    with pytest.raises(UserError, match=r"no task 'arc_esy'.*Did you mean arc_easy"):
        check_harness_tasks(["arc_easy", "arc_esy"])
    with pytest.raises(UserError, match=r"no task 'tiny_chioce'.*Did you mean tiny_choice"):
        run(None, TOKENIZER, ["tiny_chioce"], include_path=folder)
    with pytest.raises(UserError, match=r"no task 'zzzz'. `lm_eval ls tasks` lists them"):
        check_harness_tasks(["zzzz"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "tasks: none is given"),
        ({"tasks": ["a", "b", "a"]}, "tasks: a is given more than once"),
        ({"include_path": "no/such/folder"}, "there is no folder 'no/such/folder'"),
        ({"limit": 0}, "limit: 0 is not allowed"),
        ({"limit": 2.5}, "limit: 2.5 is not allowed"),
        ({"num_fewshot": -1}, "num_fewshot: -1 is not allowed"),
        ({"batch_size": 0}, "batch_size: 0 is not allowed"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_harness_tasks(**{"tasks": ["tiny_choice"], **settings})


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"pip install 'moa-peft\[eval\]'"):
        check_harness_tasks(["tiny_choice"])


@pytest.mark.parametrize(("offline", "advice"), [(True, "HF_HUB_OFFLINE"), (False, "Check the network")])
def test_data_that_cannot_be_loaded(folder: str, monkeypatch: pytest.MonkeyPatch, offline: bool, advice: str) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'someone/something' on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr("moa_peft.harness.is_offline_mode", lambda: offline)
    with pytest.raises(UserError, match=r"tiny_choice could not be loaded.*someone/something") as caught:
        load_harness_tasks(["tiny_choice"], include_path=folder)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unsafe_code": True}, "tiny_writing runs code that the model writes"),
        ({"generation_kwargs": {"until": ["?"], "max_gen_toks": 512}}, "write 512 tokens .* has 512 positions"),
    ],
)
def test_tasks_that_cannot_run_here(
    tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    include = write_tasks(tmp_path, CHOICE, WRITING | change)
    model = adapted()
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
    with pytest.raises(UserError, match=message):
        run(model, TOKENIZER, ["tiny_choice", "tiny_writing"], include_path=include)


def test_the_command_of_the_harness_runs_through_exec(
    folder: str, tmp_path: Path, built_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: tests/test_cli_commands.py covers the registration in a new one."""
    base, adapter, output = save_tiny(tmp_path / "base"), tmp_path / "adapter", tmp_path / "results"
    model = adapted()
    model.save_pretrained(adapter)
    words = ["--model", "hf", "--model_args", f"pretrained={base},peft={adapter}", "--tasks", "tiny_choice"]
    words += ["--include_path", folder, "--device", "cpu", "--output_path", str(output), "--log_samples"]
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    for variable in ("PYTHONPATH", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    assert main(["exec", "--", "lm_eval", *words]) == 0
    (file,) = output.rglob("samples_tiny_choice_*.jsonl")
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = [float(response[0][0]) for sample in samples for response in sample["resps"]]
    assert found == pytest.approx([value for value, _ in expected_likelihoods(model)], abs=1e-3)


def test_the_length_that_is_checked_is_that_of_the_harness() -> None:
    from lm_eval.models import huggingface

    lm: Any = huggingface.HFLM
    assert lm.max_gen_toks.fget(None) == _DEFAULT_NEW_TOKENS
