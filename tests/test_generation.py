"""Generation: greedy is greedy, batches change nothing, results keep their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import BloomConfig, Gemma3Config, GenerationConfig

from moa_peft import MoAConfig
from moa_peft.adapter_loading import load_adapter
from moa_peft.base_models import load_model
from moa_peft.errors import UserError
from moa_peft.generation import generate_texts, max_positions, stream_text
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("ab", "a longer prompt", "x", "12+3", "the sum of")]


def adapted(family: str = "llama") -> Any:
    model = get_peft_model(tiny_model(family), MoAConfig.soft(rank=2, task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def greedy_by_hand(model: Any, prompt: list[int], *, steps: int) -> str:
    """Append the most probable token, one full forward per token; stop at the end token."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == TOKENIZER.eos_token_id:
            break
    return TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_greedy_ignores_the_settings_of_the_base() -> None:
    model = adapted()
    expected = [greedy_by_hand(model, prompt, steps=12) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    hostile = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        min_new_tokens=10,
        num_beams=3,
        num_return_sequences=2,
        suppress_tokens=[40, 41],
        eos_token_id=2,
    )
    model.generation_config = hostile
    model.get_base_model().generation_config = hostile
    assert generate_texts(model, TOKENIZER, PROMPTS, max_new_tokens=12, batch_size=1) == expected
    assert model.generation_config is hostile and model.get_base_model().generation_config is hostile


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batches_keep_results_and_order(batch_size: int) -> None:
    """Without the prompt expert, whose unrotated keys depend on absolute positions."""
    model = get_peft_model(tiny_model("qwen3"), MoAConfig.soft(rank=2, prompt=False, task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    alone = generate_texts(model, TOKENIZER, PROMPTS, max_new_tokens=10, batch_size=1)
    assert generate_texts(model, TOKENIZER, PROMPTS, max_new_tokens=10, batch_size=batch_size) == alone


def test_answers_stop_at_every_end_token() -> None:
    model = adapted()
    free = generate_texts(model, TOKENIZER, PROMPTS[:1], max_new_tokens=8, batch_size=1)[0]
    first = TOKENIZER(free)["input_ids"][0]
    assert len(TOKENIZER(free)["input_ids"]) > 1
    stopped = generate_texts(model, TOKENIZER, PROMPTS[:1], max_new_tokens=8, batch_size=1, end_ids=[first])[0]
    assert TOKENIZER(stopped)["input_ids"] == [first]
    model.generation_config.eos_token_id = [2, first]
    assert generate_texts(model, TOKENIZER, PROMPTS[:1], max_new_tokens=8, batch_size=1)[0] == stopped


def test_a_batch_ends_once_all_its_answers_are_over() -> None:
    model = adapted()
    free = generate_texts(model, TOKENIZER, PROMPTS, max_new_tokens=9, batch_size=5)
    seen: list[str] = []

    def is_over(text: str) -> bool:
        seen.append(text)
        return len(TOKENIZER(text)["input_ids"]) >= 3

    cut = generate_texts(model, TOKENIZER, PROMPTS, max_new_tokens=9, batch_size=5, is_over=is_over)
    assert all(whole.startswith(part) for whole, part in zip(free, cut, strict=True))
    assert max(len(TOKENIZER(text)["input_ids"]) for text in seen) == 3
    assert sum(map(len, cut)) < sum(map(len, free))


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
    ],
)
def test_positions_of_a_stretched_model_count_as_stretched(rope: dict[str, Any], positions: int) -> None:
    config = tiny_model().config
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    assert max_positions(config) == positions


def test_positions_are_found_where_the_family_has_them() -> None:
    assert max_positions(tiny_model("gpt2").config) == 512
    gemma = Gemma3Config(text_config={"max_position_embeddings": 77})
    assert max_positions(gemma) == 77
    assert max_positions(BloomConfig()) is None


def test_every_position_is_used_and_none_beyond() -> None:
    """GPT-2 has a table of positions, so that one too many would be an error of the table."""
    model, prompt = tiny_model("gpt2"), [5] * 505
    assert generate_texts(model, TOKENIZER, [prompt], max_new_tokens=8)[0] is not None
    with pytest.raises(UserError, match="row 7, which has 505 tokens.*\n.*at most 8"):
        generate_texts(model, TOKENIZER, [prompt], max_new_tokens=9, names=["row 7"])
    with pytest.raises(UserError, match="prompt 2 has 513 tokens"):
        generate_texts(model, TOKENIZER, [prompt, [5] * 513], max_new_tokens=1)


def test_sampling_follows_the_seed() -> None:
    model = adapted()
    settings = {"max_new_tokens": 10, "batch_size": 5, "temperature": 2.0}
    first = generate_texts(model, TOKENIZER, PROMPTS, seed=1, **settings)
    assert generate_texts(model, TOKENIZER, PROMPTS, seed=1, **settings) == first
    assert generate_texts(model, TOKENIZER, PROMPTS, seed=2, **settings) != first


def test_the_training_mode_comes_back() -> None:
    model = adapted().train()
    generate_texts(model, TOKENIZER, PROMPTS[:1], max_new_tokens=1)
    assert model.training


def test_streaming_prints_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    text = stream_text(model, TOKENIZER, PROMPTS[1], max_new_tokens=6)
    assert text == generate_texts(model, TOKENIZER, [PROMPTS[1]], max_new_tokens=6)[0]
    assert capsys.readouterr().out.replace(" ", "").strip() == text.replace(" ", "").strip()


def test_load_adapter_restores_the_trained_model(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    from peft import AutoPeftModelForCausalLM  # noqa: F401 - importable beside ours
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, MoAConfig.sparse(rank=2, task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = load_adapter(tmp_path / "adapter", dtype="float32", device="cpu")
    ids = torch.tensor([PROMPTS[1]])
    torch.testing.assert_close(loaded.model(ids).logits, model.eval()(ids).logits)
    assert loaded.template is None and loaded.tokenizer.eos_token_id == 2


def test_the_base_of_an_adapter_may_be_quantised(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM

    save_tiny(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, MoAConfig.soft(rank=2, task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = load_adapter(tmp_path / "adapter", quantization="4bit", device="cpu")
    assert any(type(module).__name__ == "Linear4bit" for module in loaded.model.modules())
    ids = torch.tensor([PROMPTS[1]])
    # The adapter starts at zero, so the difference is that of the quantised base, and not nothing.
    difference = (loaded.model(ids).logits.float() - base(ids).logits).abs().max()
    assert 0 < difference < 2


@pytest.mark.parametrize("settings", [{"quantization": None}, {"quantization": "int4"}, {"dtype": "fp16"}])
def test_a_base_of_an_unknown_kind_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    save_tiny(tmp_path / "base")
    with pytest.raises(UserError, match=f"{next(iter(settings))}: .* is not allowed; give one of"):
        load_model(str(tmp_path / "base"), **settings)


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.5}])
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        generate_texts(tiny_model(), TOKENIZER, PROMPTS, **settings)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate_texts(tiny_model(), TOKENIZER, [[]])
