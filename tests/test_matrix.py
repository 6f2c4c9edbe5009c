"""Invariants of every method variant on every model family."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from moa_peft.layer import MoALayer
from tests.matrix import CASES, Family, Variant, adapted, randomise_adapter
from tests.models import tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*has no site for.*:UserWarning")
cases = pytest.mark.parametrize(
    ("variant", "family"), CASES, ids=[f"{variant.name}-{family.name}" for variant, family in CASES]
)


def logits(model: torch.nn.Module, **kwargs: torch.Tensor) -> torch.Tensor:
    batch = {key: value for key, value in (kwargs or tiny_batch()).items() if key != "labels"}
    with torch.no_grad():
        return model(**batch).logits


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@cases
def test_adding_it_changes_no_output(variant: Variant, family: Family):
    base = logits(tiny_model(family.name))
    start = logits(adapted(variant, family, trained=False))
    if variant.inexact_start:
        assert not torch.equal(start, base)
        torch.testing.assert_close(start, base, atol=0.1, rtol=0.1)
    else:
        assert torch.equal(start, base)


@cases
def test_disabled_is_the_base_model_bitwise(variant: Variant, family: Family):
    base = logits(tiny_model(family.name))
    model = adapted(variant, family)
    assert not torch.allclose(logits(model), base, atol=1e-3), "the adapter must do something"
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert not torch.allclose(logits(model), base, atol=1e-3)


@cases
def test_every_trainable_tensor_moves_and_no_other(variant: Variant, family: Family):
    model = adapted(variant, family).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        model(**tiny_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    adapter = {name for name in before if ".moa." in name}
    stays = {name for name in adapter if variant.frozen and variant.frozen_part in name}
    assert bool(stays) == bool(variant.frozen)
    assert trainable == adapter - stays
    assert moved == trainable


@cases
def test_saved_and_loaded_under_another_seed(variant: Variant, family: Family, tmp_path):
    model = adapted(variant, family)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == sum(".moa." in name for name, _ in model.named_parameters())
    containers = (".moa.moa_router.", ".moa.moa_experts.", ".moa.moa_shared.")
    assert all(any(container in name for container in containers) for name in saved)
    torch.manual_seed(54321)
    again = PeftModel.from_pretrained(tiny_model(family.name), tmp_path)
    assert torch.equal(logits(again), expected)


@cases
def test_cached_generation_equals_uncached(variant: Variant, family: Family):
    if variant.needs_prompt:
        pytest.skip(f"{variant.needs_prompt}; see tests/test_sequence_granularity.py")
    model = adapted(variant, family)
    batch = {key: value for key, value in tiny_batch(tokens=5).items() if key != "labels"}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**batch, **settings, use_cache=True)
    uncached = model.generate(**batch, **settings, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=2e-4, rtol=1e-4)


@cases
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_equals_plain_with_two_forwards(variant: Variant, family: Family, reentrant: bool):
    model = adapted(variant, family).train()
    first, second = tiny_batch(seed=3), tiny_batch(seed=4, tokens=7)
    (model(**first).loss + 0.5 * model(**second).loss).backward()
    plain = gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    (model(**first).loss + 0.5 * model(**second).loss).backward()
    checkpointed = gradients(model)
    adapter = {name for name in plain if ".moa." in name}
    assert adapter <= set(checkpointed)
    for name in adapter:
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-6, rtol=1e-4)


@cases
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(variant: Variant, family: Family, side: str):
    model = adapted(variant, family)
    row = tiny_batch(rows=1)["input_ids"]
    expected = logits(model, input_ids=row, attention_mask=torch.ones_like(row))
    pads = torch.full((1, 4), 7)
    order = [pads, row] if side == "left" else [row, pads]
    ids = torch.cat([torch.cat(order, dim=1), tiny_batch(rows=1, tokens=13, seed=2)["input_ids"]])
    mask = torch.ones_like(ids)
    mask[0] = torch.cat([torch.zeros_like(part) if part is pads else torch.ones_like(part) for part in order], 1)[0]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = logits(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[:1][mask[:1].bool()][None], expected, atol=2e-5, rtol=1e-4)


@cases
def test_deepcopy_is_equal_and_independent(variant: Variant, family: Family):
    model = adapted(variant, family)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    randomise_adapter(twin, seed=6)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(twin), expected, atol=1e-3)


@cases
def test_unload_leaves_nothing(variant: Variant, family: Family):
    untouched = tiny_model(family.name)
    model = adapted(variant, family)
    logits(model)
    base = model.unload()
    assert list(base.state_dict()) == list(untouched.state_dict())
    for one, other in zip(base.modules(), untouched.modules(), strict=True):
        assert type(one) is type(other)
        assert len(one._forward_hooks) == len(other._forward_hooks)
        assert len(one._forward_pre_hooks) == len(other._forward_pre_hooks)
        assert not [key for key in one.__dict__ if "moa" in key]
    assert torch.equal(logits(base), logits(untouched))


@cases
def test_a_second_adapter_is_separate(variant: Variant, family: Family, tmp_path):
    model = adapted(variant, family)
    first = logits(model)
    model.add_adapter("other", variant.config())
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    if not variant.inexact_start:
        assert torch.equal(logits(model), logits(tiny_model(family.name)))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".other." in name for name in trainable)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert len(names) == len(load_file(tmp_path / "other" / "adapter_model.safetensors"))
    model.delete_adapter("other")
    assert not [name for name, _ in model.named_parameters() if "other" in name]
    assert torch.equal(logits(model), first)


@cases
def test_bf16_base_with_float32_masters(variant: Variant, family: Family):
    model = adapted(variant, family, dtype=torch.bfloat16).train()
    adapter = [p for name, p in model.named_parameters() if ".moa." in name]
    assert {p.dtype for p in adapter} == {torch.float32}
    loss = model(**tiny_batch()).loss
    loss.backward()
    for p in adapter:
        if p.requires_grad:
            assert p.grad is not None and p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all()
    full = adapted(variant, family)(**tiny_batch()).loss
    torch.testing.assert_close(loss.float(), full, atol=0.15, rtol=0.05)


@cases
def test_nothing_of_a_forward_is_kept(variant: Variant, family: Family):
    model = adapted(variant, family)
    model(**tiny_batch())
    layers = [module for module in model.modules() if isinstance(module, MoALayer)]
    assert layers
    for layer in layers:
        assert layer.calls.current() is None
