"""Parameter groups: who is a router, what decays, which learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from peft import get_peft_model

from moa_peft import MoAConfig
from moa_peft.data import CompletionCollator
from moa_peft.training.adapters import router_parameters
from moa_peft.training.arguments import MoATrainingArguments
from moa_peft.training.optimizer_groups import parameter_groups
from moa_peft.training.trainer import MoATrainer
from tests.tiny import tiny_model


@pytest.mark.parametrize("method", ["soft_moa", "sparse_moa"])
def test_every_trainable_parameter_is_in_its_group_once(method: str) -> None:
    model = get_peft_model(tiny_model("qwen3"), MoAConfig.preset(method, task_type="CAUSAL_LM"))
    routers = router_parameters(model)
    groups = parameter_groups(
        model, learning_rate=0.1, router_learning_rate=0.01, weight_decay=0.5, router_parameters=routers
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable) and len(set(grouped)) == len(grouped)
    assert [group["name"] for group in groups][:1] == ["experts_matrices"]
    assert any(group["name"] == "routers_matrices" for group in groups)
    for group in groups:
        part, kind = group["name"].split("_")
        assert group["lr"] == (0.01 if part == "routers" else 0.1)
        assert group["weight_decay"] == (0.5 if kind == "matrices" else 0.0)
        for parameter in group["params"]:
            assert (parameter.ndim >= 2) == (kind == "matrices")
            assert ("moa_router" in names[id(parameter)]) == (part == "routers")


def test_the_trainer_uses_the_groups(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), MoAConfig.soft(task_type="CAUSAL_LM"))
    arguments = MoATrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=0.1,
        router_learning_rate=0.02,
        weight_decay=0.3,
        adam_beta2=0.95,
        report_to="none",
        use_cpu=True,
    )
    trainer = MoATrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6]}]),
        data_collator=CompletionCollator(pad_token_id=0),
        router_parameters=router_parameters(model),
    )
    optimizer = trainer.create_optimizer()
    found = {group["name"]: (group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups}
    assert found["experts_matrices"] == (0.1, 0.3, (0.9, 0.95))
    assert found["routers_matrices"] == (0.02, 0.3, (0.9, 0.95))
    assert all(decay == 0.0 for name, (_, decay, _) in found.items() if name.endswith("vectors"))
