"""The exact parameter counts of the papers' configurations, from configurations alone."""

import copy

import pytest
from peft import PeftConfig
from transformers import PreTrainedConfig

from moa_peft import MoAConfig
from moa_peft.counting import count_parameters
from studies.reference_models import LLAMA_2_7B, LLAMA_31_8B, QWEN3_8B, QWEN3_14B

FROZEN_THRESHOLD = MoAConfig.sparse(threshold_gradient="none")
ROWS = [
    # model, configuration, LoRA, parallel, prompt, router, threshold, total
    (LLAMA_31_8B, MoAConfig.soft(), 11_534_336, 4_325_888, 1_311_744, 7_348_320, 0, 24_520_288),
    (LLAMA_31_8B, MoAConfig.soft(hidden_per_expert=0), 11_534_336, 4_325_888, 1_311_744, 917_728, 0, 18_089_696),
    (LLAMA_31_8B, MoAConfig.soft(prompt=False), 11_534_336, 4_325_888, 0, 6_297_792, 0, 22_158_016),
    (LLAMA_31_8B, MoAConfig.sparse(), 11_534_336, 4_325_888, 0, 6_297_792, 131_104, 22_289_120),
    (LLAMA_31_8B, MoAConfig.sparse(hidden_per_expert=0), 11_534_336, 4_325_888, 0, 786_624, 131_104, 16_777_952),
    (QWEN3_8B, MoAConfig.soft(prompt=False), 12_386_304, 4_866_624, 0, 7_085_016, 0, 24_337_944),
    (QWEN3_8B, MoAConfig.sparse(), 12_386_304, 4_866_624, 0, 7_085_016, 147_492, 24_485_436),
    (QWEN3_14B, MoAConfig.soft(prompt=False), 17_694_720, 6_759_040, 0, 9_838_320, 0, 34_292_080),
    (QWEN3_14B, MoAConfig.sparse(), 17_694_720, 6_759_040, 0, 9_838_320, 204_840, 34_496_920),
    # The threshold counts whether it is trained or not.
    (
        LLAMA_31_8B,
        MoAConfig.sparse(threshold_gradient="none"),
        11_534_336,
        4_325_888,
        0,
        6_297_792,
        131_104,
        22_289_120,
    ),
    (LLAMA_31_8B, MoAConfig.preset("unipeft"), 11_534_336, 4_325_888, 1_311_744, 393_312, 0, 17_565_280),
    (LLAMA_31_8B, MoAConfig.preset("naive_composition"), 11_534_336, 4_325_888, 1_311_744, 0, 0, 17_171_968),
    (LLAMA_31_8B, MoAConfig.preset("instance_moa"), 11_534_336, 4_325_888, 1_311_744, 7_348_320, 0, 24_520_288),
    (LLAMA_31_8B, MoAConfig.preset("parallel_adapter"), 0, 4_325_888, 0, 0, 0, 4_325_888),
    (LLAMA_31_8B, MoAConfig.preset("prompt"), 0, 0, 1_311_744, 0, 0, 1_311_744),
    (LLAMA_31_8B, MoAConfig.preset("molora"), 92_274_688, 0, 0, 7_864_320, 0, 100_139_008),
]

# Totals of methods whose blocks are alike.
TOTALS = [
    (LLAMA_31_8B, "lora", {}, 23_068_672),
    (QWEN3_8B, "lora", {}, 24_772_608),
    (QWEN3_14B, "lora", {}, 35_389_440),
    (QWEN3_8B, "molora", {}, 107_347_968),
    (QWEN3_14B, "molora", {"num_experts": 4}, 76_840_960),
    (LLAMA_31_8B, "hydralora", {}, 45_088_768),
    (LLAMA_31_8B, "moe_lora_topk", {}, 100_140_288),
    (LLAMA_31_8B, "adamole", {}, 101_123_488),
    # 212.5 million, 3.15 % of the model.
    (LLAMA_2_7B, "dynmole", {}, 212_484_096),
    # 25.16, 33.39 and 35.82 million.
    (QWEN3_8B, "comol", {}, 25_164_288),
    (QWEN3_8B, "comol", {"router_input": "input"}, 33_398_784),
    (QWEN3_14B, "comol", {}, 35_824_640),
    # 5 experts per layer on average: 99,942,400 of LoRA, 5,693,440 of routers.
    (LLAMA_2_7B, "mola", {}, 105_635_840),
    # 203.4 million.
    (LLAMA_2_7B, "mixlora", {}, 203_423_744),
]


def count_from_few_layers(model: PreTrainedConfig, config: PeftConfig) -> int:
    """Parameters that `config` adds to a model of a multiple of 4 layers, from models of 4 and 8 layers.

    Every fourth of the layers is alike, and what layers share is the rest.
    """
    four, eight = (_count_with_layers(model, config, layers) for layers in (4, 8))
    return four + (eight - four) * (model.num_hidden_layers - 4) // 4


def _count_with_layers(model: PreTrainedConfig, config: PeftConfig, layers: int) -> int:
    shorter = copy.deepcopy(model)
    shorter.num_hidden_layers = layers
    if hasattr(shorter, "layer_types"):
        shorter.layer_types = shorter.layer_types[:1] * layers
    return count_parameters(shorter, config).total


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


@pytest.mark.parametrize(("model", "method", "knobs", "total"), TOTALS)
def test_totals_equal_the_published_ones(model, method, knobs, total):
    assert count_from_few_layers(model, MoAConfig.preset(method, task_type="CAUSAL_LM", **knobs)) == total


def test_a_share_of_the_base():
    count = count_parameters(LLAMA_2_7B, MoAConfig.preset("prompt"))
    assert count.base == 6_738_415_616
    assert round(100 * 212_484_096 / count.base, 2) == 3.15


@pytest.mark.parametrize("layers", [4, 8])
def test_networks_that_layers_share_count_once(layers):
    """LD-MoLE predicts its sparsity by one network per input width."""
    blocks = layers * (167_772_160 + 9_961_472) // 32
    networks = sum(256 * (width + 1) + 256 + 1 for width in (4096, 14336))
    assert _count_with_layers(LLAMA_31_8B, MoAConfig.preset("ld_mole"), layers) == blocks + networks
