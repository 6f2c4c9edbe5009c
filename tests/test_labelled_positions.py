"""The loss of labelled positions equals the plain loss: value, gradients, accumulation, families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from moa_peft.data import CompletionCollator
from moa_peft.pooling import prompt_mask
from moa_peft.training.arguments import MoATrainingArguments
from moa_peft.training.labelled_positions import only_labelled_positions
from moa_peft.training.trainer import MoATrainer
from tests.tiny import tiny_model

FAMILIES = ["llama", "gemma2", "granite", "gpt2"]


def adapted(family: str) -> Any:
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
    model = get_peft_model(tiny_model(family), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def rows(*, count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of different lengths; row 1 has no label at all, row 2 has one on its first token only."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = 5 + 3 * index
        ids = torch.randint(4, 130, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        if index == 1:
            labels = [-100] * length
        if index == 2:
            labels = [ids[0]] + [-100] * (length - 1)
        made.append({"input_ids": ids, "labels": labels})
    return made


def plain_loss_sum(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    loss = functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="sum"
    )
    return loss, int((targets != -100).sum())


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trainer_for(model: Any, tmp_path: Any, **options: Any) -> MoATrainer:
    arguments = MoATrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, dataloader_pin_memory=False, **options
    )
    data = Dataset.from_list(rows(count=4))
    return MoATrainer(
        model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=CompletionCollator(pad_token_id=0)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_equals_the_plain_loss(family: str, padding_side: Any, tmp_path: Any) -> None:
    model = adapted(family).train()
    batch = CompletionCollator(pad_token_id=0, padding_side=padding_side)(rows(count=4))
    loss_sum, count = plain_loss_sum(model, batch)
    (loss_sum / count).backward()
    expected = gradients(model)
    model.zero_grad()
    trainer = trainer_for(model, tmp_path)
    loss = trainer.compute_loss(model, batch)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    torch.testing.assert_close(loss, loss_sum / count)
    found = gradients(model)
    assert found.keys() == expected.keys() and any(value.abs().max() > 1e-4 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_labelled_positions_reach_the_output_layer(family: str) -> None:
    model = adapted(family)
    batch = CompletionCollator(pad_token_id=0)(rows(count=4))
    expected = int((batch["labels"][:, 1:] != -100).sum())
    seen: list[torch.Size] = []
    head = model.get_output_embeddings()
    watch = head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with only_labelled_positions(head, batch["labels"]) as positions:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    watch.remove()
    assert positions.selected
    assert seen == [torch.Size([1, expected, 132])] and logits.shape == seen[0]
    assert not head._forward_pre_hooks
    full = model(input_ids=batch["input_ids"]).logits
    assert full.shape[:2] == batch["input_ids"].shape


def test_a_model_that_does_not_call_its_output_layer_has_the_same_loss() -> None:
    model = adapted("llama")
    batch = CompletionCollator(pad_token_id=0)(rows(count=4))
    loss_sum, _ = plain_loss_sum(model, batch)
    with only_labelled_positions(None, batch["labels"]) as positions:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert not positions.selected
    torch.testing.assert_close(positions.loss_sum(logits), loss_sum)


def test_a_batch_without_labels_has_loss_zero_and_finite_gradients(tmp_path: Any) -> None:
    model = adapted("llama").train()
    batch = CompletionCollator(pad_token_id=0)(rows(count=3)[1:])
    trainer = trainer_for(model, tmp_path)
    loss = trainer.compute_loss(model, batch)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.isfinite(value).all() for value in gradients(model).values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_changes_nothing(micro_batch: int, checkpointing: bool, tmp_path: Any) -> None:
    """One optimiser step of plain SGD moves the weights by the gradient of the loss over all four rows."""
    model = adapted("gemma2").train()
    batch = CompletionCollator(pad_token_id=0)(rows(count=4))
    loss_sum, count = plain_loss_sum(model, batch)
    (loss_sum / count).backward()
    expected = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    step = gradients(model)
    model.zero_grad()
    trainer = trainer_for(
        model,
        tmp_path,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=4 // micro_batch,
        max_steps=1,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_steps=1,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx((loss_sum / count).item(), rel=1e-4)
    for name, value in model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value, expected[name] - 0.5 * step[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_validation_loss_is_the_mean_over_labelled_positions(batch_size: int, tmp_path: Any) -> None:
    model = adapted("granite")
    batch = CompletionCollator(pad_token_id=0)(rows(count=4))
    with torch.no_grad():
        loss_sum, count = plain_loss_sum(model.eval(), batch)
    trainer = trainer_for(model, tmp_path, per_device_eval_batch_size=batch_size)
    assert trainer.evaluate()["eval_loss"] == pytest.approx((loss_sum / count).item(), rel=1e-5)


def test_prompt_mask_ends_at_the_first_label() -> None:
    labels = torch.tensor([[-100, -100, 5, -100, 6], [-100, -100, -100, -100, -100], [7, 8, -100, -100, -100]])
    attention_mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    expected = torch.tensor([[0, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(prompt_mask(labels, attention_mask), expected)
