"""Half-precision bases, float32 master weights, and autocast."""

from collections import Counter

import pytest
import torch
from peft import get_peft_model

from tests.matrix import randomise_adapter
from tests.models import tiny_batch, tiny_model
from tests.native import adapter_tensors, gradients, logits, soft, sparse, trained

CONFIGS = {"soft": soft, "sparse": sparse}
by_config = pytest.mark.parametrize("kind", CONFIGS)
by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
by_family = pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])


@by_config
@by_dtype
@by_family
def test_half_base_with_master_weights_under_autocast(family, dtype, kind):
    model = trained(family, CONFIGS[kind](), dtype=dtype).train()
    assert {tensor.dtype for tensor in adapter_tensors(model).values()} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**tiny_batch()).loss
    loss.backward()
    found = gradients(model)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    for gradient in found.values():
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all()
    full = trained(family, CONFIGS[kind]()).train()
    torch.testing.assert_close(loss.float(), full(**tiny_batch()).loss, atol=0.15, rtol=0.05)


@by_config
@by_dtype
def test_float32_base_under_autocast(dtype, kind):
    """What Trainer's bf16 flag does to a model loaded in float32."""
    model = trained(config=CONFIGS[kind]()).train()
    plain = model(**tiny_batch()).loss
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**tiny_batch()).loss
    torch.testing.assert_close(loss.float(), plain, atol=0.15, rtol=0.05)
    loss.backward()
    for gradient in gradients(model).values():
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all()


@by_config
def test_autocast_does_not_touch_the_routing(kind):
    """Weights and thresholds are compared in float32: an autocast sigmoid would have eight bits of mantissa."""
    from moa_peft import record_routing

    model = trained(config=CONFIGS[kind]())
    with record_routing(model) as record, torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model)
    (first, *_) = next(iter(record.routings.values()))
    assert first.scores.dtype == first.weights.dtype == torch.float32
    assert not torch.equal(first.scores, first.scores.bfloat16().float())


@by_dtype
def test_adapter_weights_follow_the_base_when_asked(dtype):
    model = get_peft_model(tiny_model("llama", dtype=dtype), soft(), autocast_adapter_dtype=False)
    randomise_adapter(model)
    assert {tensor.dtype for tensor in adapter_tensors(model).values()} == {dtype}
    loss = model.train()(**tiny_batch()).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), trained()(**tiny_batch()).loss, atol=0.15, rtol=0.05)


def _wide_float32_tensors_kept(model: torch.nn.Module) -> Counter[tuple[int, ...]]:
    shapes: Counter[tuple[int, ...]] = Counter()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float32 and tensor.dim() > 1 and tensor.shape[-1] >= model.config.hidden_size:
            shapes[tuple(tensor.shape)] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**tiny_batch(rows=4, tokens=31))
    return shapes


@by_config
@by_dtype
def test_no_further_float32_copy_of_an_activation_is_kept_for_backward(dtype, kind):
    """Weights are cast to the activations' dtype, never the other way round: the base's own norms keep as many."""
    model = trained(config=CONFIGS[kind](), dtype=dtype).train()
    model.enable_input_require_grads()
    with_adapter = _wide_float32_tensors_kept(model)
    base = _wide_float32_tensors_kept(model.unload())
    weights = Counter(tuple(p.shape) for p in adapter_tensors(trained(config=CONFIGS[kind]())).values())
    assert base
    assert not with_adapter - base - weights


@by_config
@by_dtype
def test_generation_in_half_precision(dtype, kind):
    model = trained(config=CONFIGS[kind](), dtype=dtype)
    batch = {key: value for key, value in tiny_batch(tokens=5).items() if key != "labels"}
    output = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert output.shape == (3, 9)
