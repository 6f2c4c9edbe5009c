"""The exact parameter counts of the paper's configurations (METHODS 1.12), from configurations alone."""

import pytest
from transformers import LlamaConfig, Qwen3Config

from moa_peft import MoAConfig
from moa_peft.counting import count_parameters

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


def _qwen3(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )


QWEN3_8B = _qwen3(4096, 12288, 36, 32)
QWEN3_14B = _qwen3(5120, 17408, 40, 40)

ROWS = [
    # model, configuration, LoRA, parallel, prompt, router, threshold, total
    (LLAMA_8B, MoAConfig.soft(), 11_534_336, 4_325_888, 1_311_744, 7_348_320, 0, 24_520_288),
    (LLAMA_8B, MoAConfig.soft(hidden_per_expert=0), 11_534_336, 4_325_888, 1_311_744, 917_728, 0, 18_089_696),
    (LLAMA_8B, MoAConfig.soft(prompt=False), 11_534_336, 4_325_888, 0, 6_297_792, 0, 22_158_016),
    (LLAMA_8B, MoAConfig.sparse(), 11_534_336, 4_325_888, 0, 6_297_792, 131_104, 22_289_120),
    (LLAMA_8B, MoAConfig.sparse(hidden_per_expert=0), 11_534_336, 4_325_888, 0, 786_624, 131_104, 16_777_952),
    (QWEN3_8B, MoAConfig.soft(prompt=False), 12_386_304, 4_866_624, 0, 7_085_016, 0, 24_337_944),
    (QWEN3_8B, MoAConfig.sparse(), 12_386_304, 4_866_624, 0, 7_085_016, 147_492, 24_485_436),
    (QWEN3_14B, MoAConfig.soft(prompt=False), 17_694_720, 6_759_040, 0, 9_838_320, 0, 34_292_080),
    (QWEN3_14B, MoAConfig.sparse(), 17_694_720, 6_759_040, 0, 9_838_320, 204_840, 34_496_920),
    # The threshold counts whether it is trained or not.
    (LLAMA_8B, MoAConfig.sparse(threshold_gradient="none"), 11_534_336, 4_325_888, 0, 6_297_792, 131_104, 22_289_120),
]


@pytest.mark.parametrize(("model", "config", "lora", "parallel", "prompt", "router", "threshold", "total"), ROWS)
def test_counts_equal_the_published_ones(model, config, lora, parallel, prompt, router, threshold, total):
    count = count_parameters(model, config)
    assert count.types.get("lora", 0) == lora
    assert count.types.get("parallel", 0) == parallel
    assert count.types.get("prompt", 0) == prompt
    assert count.router == router
    assert count.threshold == threshold
    assert count.other == 0
    assert count.total == total
    assert sum(count.experts.values()) == lora + parallel + prompt
