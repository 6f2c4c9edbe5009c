"""Auxiliary losses in real models: gradients equal those of the losses added by hand, and trainers log them."""

from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from moa_peft import MoAConfig, record_routing
from moa_peft.auxiliary import loss_scale, read_losses
from moa_peft.errors import UserError
from moa_peft.layer import MoALayer
from moa_peft.losses import loss_values, parse_losses
from tests.matrix import randomise_adapter
from tests.models import tiny_batch, tiny_model
from tests.native import CAUSAL

LOSSES: list[dict[str, Any]] = [
    {"type": "balance", "coefficient": 0.5},
    {"type": "z", "coefficient": 0.1},
    {"type": "entropy", "coefficient": 0.2, "reduction": "mean"},
]
SCOPES = {
    "module": {
        "scope": "module",
        "experts": [{"type": "lora", "target": ["q", "v", "o", "down"], "rank": 4, "num": 4}],
        "router": {"type": "top_k", "k": 2},
    },
    "block": {"experts": MoAConfig.soft(rank=4).experts, "router": {"type": "top_k", "k": 3}},
    "mlp": {
        "scope": "mlp",
        "experts": [{"type": "mlp_lora", "rank": 4, "num": 4}],
        "router": {"type": "top_k", "k": 2},
    },
}
scopes = pytest.mark.parametrize("scope", SCOPES)


def mixture(scope: str, *, losses: list[dict[str, Any]] | None = LOSSES, family: str = "llama", **config: Any) -> Any:
    torch.manual_seed(0)
    settings: Any = SCOPES[scope] | config
    model = get_peft_model(tiny_model(family), MoAConfig(losses=losses, **settings, **CAUSAL))
    randomise_adapter(model)
    return model.train()


def padded_batch() -> dict[str, torch.Tensor]:
    batch = tiny_batch(rows=3, tokens=9)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :4] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def gradients_by_hand(scope: str, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The losses added to the model's loss, from routings that keep their graph."""
    model = mixture(scope, losses=None)
    routings: list[Any] = []
    for module in model.modules():
        if isinstance(module, MoALayer):
            module.recorder = lambda adapter, name, routing: routings.append(routing)
    loss = model(**batch).loss
    values: dict[str, torch.Tensor] = {}
    for routing in routings:
        for name, value in loss_values(parse_losses(LOSSES), routing, batch["attention_mask"].bool()).items():
            values[name] = values.get(name, 0) + value / (len(routings) if name == "entropy" else 1)
    total = 0.5 * values["balance"] + 0.1 * values["z"] + 0.2 * values["entropy"]
    (loss + total).backward()
    return gradients(model), {f"moa/{name}": float(value) for name, value in values.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(expected) <= set(found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@scopes
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_gradients_are_those_of_the_losses_added_by_hand(scope: str, checkpointing: bool | None):
    batch = padded_batch()
    expected, values = gradients_by_hand(scope, batch)
    model = mixture(scope)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model(**batch).loss.backward()
    assert_equal(gradients(model), expected)
    assert read_losses(model) == pytest.approx(values, rel=1e-5)


@scopes
def test_without_them_the_gradients_are_others(scope: str):
    batch = padded_batch()
    expected, _ = gradients_by_hand(scope, batch)
    model = mixture(scope, losses=None)
    model(**batch).loss.backward()
    found = gradients(model)
    assert any(not torch.allclose(found[name], gradient, atol=1e-4) for name, gradient in expected.items())


def test_padding_counts_for_nothing():
    model = mixture("module")
    batch = padded_batch()
    model(**batch)
    expected = read_losses(model)
    other = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5))
    model = mixture("module")
    model(**other)
    assert read_losses(model) == pytest.approx(expected, rel=1e-5)


def test_two_adapters_have_their_own():
    model = mixture("module")
    batch = padded_batch()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.add_adapter("other", MoAConfig(losses=LOSSES[:1], **SCOPES["module"], **CAUSAL))  # type: ignore[arg-type]
    model(**batch).loss.backward()
    assert_equal(gradients(model), expected)
    read_losses(model)
    model.set_adapter("other")
    model(**batch)
    assert list(read_losses(model)) == ["moa/other/balance"]
    model.delete_adapter("other")
    model.set_adapter("default")
    model(**batch).loss.backward()
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("router", ["top_k", "sparsegen"])
def test_a_frozen_adapter_teaches_nothing_and_logs_nothing(router: str):
    """Its routings depend on what the other adapter added in the blocks before, which its losses must not move."""

    def train(coefficient: float) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        losses: list[dict[str, Any]] = [{"type": "balance", "coefficient": coefficient}]
        model = mixture("module", losses=losses, router={"type": router})
        model.add_adapter("other", MoAConfig.preset("molora", num_experts=2, rank=4, **CAUSAL))
        randomise_adapter(model)
        model.base_model.set_adapter(["default", "other"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".moa" in name and ".other." in name)
        model(**padded_batch()).loss.backward()
        return gradients(model), read_losses(model)

    found, logged = train(50.0)
    assert found and logged == {}
    assert_equal(found, train(1.0)[0])


def test_a_network_that_routers_share_is_taught_by_their_losses():
    model = mixture("module", losses=LOSSES[:1], router={"type": "sparsegen"})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".moa_shared." in name)
    model(**padded_batch()).loss.backward()
    assert list(read_losses(model)) == ["moa/balance"] and gradients(model)


def sequence_rows(packed: bool) -> dict[str, torch.Tensor]:
    """Sequences of 40 and 6 tokens whose prompts have 3, in a row each or in one."""
    rows = tiny_batch(rows=2, tokens=40)
    if packed:
        parts = {key: torch.cat((value[0], value[1, :6]))[None] for key, value in rows.items()}
        return parts | {"position_ids": torch.cat((torch.arange(40), torch.arange(6)))[None]}
    rows["attention_mask"][1, 6:] = 0
    rows["labels"][1, 6:] = -100
    return rows


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_each_sequence_counts_once(packed: bool):
    model = mixture("block", granularity="sequence", experts=MoAConfig.sparse(rank=4).experts)
    batch = sequence_rows(packed)
    with record_routing(model) as record:
        model(**batch)
    found: dict[str, float] = {}
    for (routing,) in record.routings.values():
        starts = torch.tensor([0, 40 if packed else routing.weights.shape[1]])
        two = routing.map(lambda values, at=starts: values.flatten(0, 1)[at])
        assert not torch.allclose(two.weights[0], two.weights[1])
        for name, value in loss_values(parse_losses(LOSSES), two).items():
            share = len(record.routings) if name == "entropy" else 1
            found[f"moa/{name}"] = found.get(f"moa/{name}", 0.0) + value.item() / share
    assert read_losses(model) == pytest.approx(found, rel=1e-5)


def test_evaluation_and_recording_have_none():
    model = mixture("module").eval()
    with torch.no_grad(), record_routing(model):
        model(**padded_batch())
    assert read_losses(model) == {}


def test_halves_with_their_scale_equal_the_mean():
    """Two micro-batches of a hand-written loop, each with half of its loss."""
    halves = [tiny_batch(rows=2, seed=seed) for seed in (1, 2)]
    parts = []
    for half in halves:
        model = mixture("module")
        model(**half).loss.backward()
        parts.append(gradients(model))
    expected = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    model = mixture("module")
    for half in halves:
        with loss_scale(model, 0.5):
            (model(**half).loss / 2).backward()
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_takes_the_mean_over_micro_batches(accumulation: int, tmp_path):
    """One step over four rows: at once, and in two micro-batches; the loss of the rows is their mean in both."""
    rows = [{key: value[0] for key, value in tiny_batch(rows=1, seed=seed).items()} for seed in range(4)]
    model = mixture("module", losses=[{"type": "z", "coefficient": 0.5}])
    seen: dict[str, torch.Tensor] = {}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(_keep_gradient, seen, name))
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "moa/z" in entry)
    expected = mixture("module", losses=[{"type": "z", "coefficient": 0.5}])
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    expected(**batch).loss.backward()
    assert logged["moa/z"] == pytest.approx(read_losses(expected)["moa/z"], rel=1e-4)
    assert_equal(seen, gradients(expected))


def _keep_gradient(seen: dict[str, torch.Tensor], name: str, parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    seen[name] = parameter.grad.clone()


def test_a_family_whose_blocks_see_no_mask_is_refused():
    base = tiny_model("falcon")
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(UserError, match="losses cannot be used with this family"):
        get_peft_model(base, MoAConfig.preset("moe_lora_topk", losses=LOSSES[:1], **CAUSAL))
    assert [name for name, _ in base.named_parameters()] == names


@pytest.mark.parametrize(
    ("router", "num", "message"),
    [
        ({"type": "softmax"}, 1, "has one expert"),
        ({"type": "top_k", "k": 3}, 2, "router.k is 3"),
    ],
)
def test_routers_that_could_learn_nothing_are_refused(router: dict[str, Any], num: int, message: str):
    base = tiny_model("llama")
    experts = [{"type": "lora", "target": "q", "num": num}]
    with pytest.raises(UserError, match=message):
        get_peft_model(base, MoAConfig(experts=experts, scope="module", router=router, **CAUSAL))
    assert not any("moa" in name for name, _ in base.named_modules())
