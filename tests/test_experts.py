"""Experts on their own, against their formulas."""

import pytest
import torch

from moa_peft.errors import UserError
from moa_peft.experts import LoraExpert, ParallelExpert, PromptExpert, SiteShape
from moa_peft.experts.lora import LoraOptions
from moa_peft.experts.parallel import ParallelOptions
from moa_peft.experts.prompt import PromptOptions
from tests.models import randomise


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_lora_is_the_weighted_low_rank_product(rslora: bool, scale: float):
    expert = LoraExpert(SiteShape(10, 7), LoraOptions(target="q", rank=4, alpha=6, rslora=rslora))
    randomise(expert)
    x, w = random(2, 5, 10), random(2, 5, 1, seed=1)
    expected = w * scale * (x @ expert.lora_A.weight.T @ expert.lora_B.weight.T)
    torch.testing.assert_close(expert(x, w), expected)


def test_lora_dropout_acts_in_training_only():
    expert = LoraExpert(SiteShape(10, 7), LoraOptions(target="q", rank=4, dropout=0.5))
    randomise(expert)
    x, w = random(2, 5, 10), torch.ones(2, 5, 1)
    torch.manual_seed(0)
    trained = expert.train()(x, w)
    assert not torch.allclose(trained, expert.eval()(x, w))
    torch.testing.assert_close(expert(x, w), x @ expert.lora_A.weight.T @ expert.lora_B.weight.T)


def test_parallel_adapter_follows_its_formula():
    expert = ParallelExpert(SiteShape(10, 10), ParallelOptions(size=3))
    randomise(expert)
    x, w = random(2, 5, 10), random(2, 5, 1, seed=1)
    inner = torch.nn.functional.silu(x @ expert.down.weight.T + expert.down.bias)
    torch.testing.assert_close(expert(x, w), w * (inner @ expert.up.weight.T + expert.up.bias))


def test_prompt_expert_equals_attention_with_repeated_heads():
    """Grouped-query attention written out with repeated keys and values, as the reference has it."""
    heads, kv_heads, width, prompt = 6, 2, 4, 3
    expert = PromptExpert(SiteShape(24, 24, heads), PromptOptions(length=prompt))
    randomise(expert, std=0.8)
    query, weight = random(2, heads, 5, width), random(2, 5, 1, seed=1)
    key, value = random(kv_heads, prompt, width, seed=2), random(kv_heads, prompt, width, seed=3)
    repeated = [t.repeat_interleave(heads // kv_heads, dim=0) for t in (key, value)]
    probabilities = torch.softmax(0.7 * query @ repeated[0].transpose(-1, -2), dim=-1)
    expected = ((expert.gate * probabilities) @ repeated[1]).transpose(1, 2) * weight[:, :, None]
    torch.testing.assert_close(expert(query, key, value, weight, scaling=0.7), expected)


@pytest.mark.parametrize("init", ["identity", "reference", "normal"])
def test_initial_weights(init: str):
    torch.manual_seed(0)
    lora = LoraExpert(SiteShape(64, 64), LoraOptions(target="q", rank=16))
    parallel = ParallelExpert(SiteShape(64, 64), ParallelOptions(size=16))
    prompt = PromptExpert(SiteShape(64, 64, 4), PromptOptions(length=50))
    for expert in (lora, parallel, prompt):
        expert.reset_parameters(init)
    x, w = random(1, 9, 64), torch.ones(1, 9, 1)
    assert lora.lora_A.weight.std() > 0 and parallel.down.weight.std() > 0
    assert not prompt.gate.any()
    assert abs(prompt.embedding.std().item() - (0.02 if init == "normal" else 1.0)) < 0.05
    if init == "identity":
        assert not lora(x, w).any() and not parallel(x, w).any()
    elif init == "reference":
        assert not lora(x, w).any()
        assert 0 < parallel(x, w).abs().max() < 1e-5
    else:
        assert lora(x, w).any() and abs(lora.lora_B.weight.std().item() - 0.02) < 2e-3


@pytest.mark.parametrize(
    ("options", "values", "words"),
    [
        (LoraOptions, {"target": "q", "rank": 0}, "rank is 0"),
        (LoraOptions, {"target": "q", "rank": True}, "rank is True"),
        (LoraOptions, {"target": "q", "alpha": -1}, "alpha is -1"),
        (LoraOptions, {"target": "q", "dropout": 1.0}, "dropout is 1.0"),
        (LoraOptions, {"target": []}, "target is"),
        (LoraOptions, {"target": "q", "rslora": 1}, "rslora is 1"),
        (LoraOptions, {"target": "q", "num": 0}, "num is 0"),
        (LoraOptions, {"target": "q", "layers": "one"}, "layers is 'one'"),
        (LoraOptions, {"target": "q", "layers": "0,5-3"}, "layers is '0,5-3', and its range '5-3' goes down"),
        (LoraOptions, {"target": "q", "layers": "3-"}, "layers is '3-'; allowed"),
        (LoraOptions, {"target": "q", "layers": [-1]}, "layers is"),
        (LoraOptions, {"target": "q", "layers": []}, "layers is"),
        (LoraOptions, {"target": "q", "optional": "yes"}, "optional is 'yes'"),
        (ParallelOptions, {"size": 0}, "size is 0"),
        (PromptOptions, {"length": 0}, "length is 0"),
    ],
)
def test_wrong_options_say_what_is_allowed(options: type, values: dict[str, object], words: str):
    with pytest.raises(UserError, match=words):
        options(**values)


def test_layers_can_be_written_as_ranges():
    assert LoraOptions(target="q", layers="0-2, 5,7-7").layer_indices() == {0, 1, 2, 5, 7}
    assert LoraOptions(target="q", layers=[3, 1]).layer_indices() == {1, 3}
    assert LoraOptions(target="q").layer_indices() is None
