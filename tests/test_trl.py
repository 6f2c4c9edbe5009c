"""TRL's trainers with `peft_config=MoAConfig(...)`, as they are."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa_peft import UserError
from moa_peft.layer import MoALayer
from tests.native import logits, soft, sparse
from tests.tiny import save_tiny

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'moa-peft[train]'")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'moa-peft[train]'")

CONFIGS = {"soft": soft, "sparse": sparse}
by_config = pytest.mark.parametrize("kind", CONFIGS)
TEXTS = [{"text": f"{a}+{a}={2 * a}" + "." * (a % 4)} for a in range(12)]
PAIRS = [{"prompt": f"{a}+{a}=", "chosen": f"{2 * a}", "rejected": f"{2 * a + 1}"} for a in range(8)]
PROMPTS = [{"prompt": f"{a}+{a}="} for a in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), "llama")


def load(base: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)


def common(folder: Path, **options: Any) -> dict[str, Any]:
    values = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return values | options


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_training(trainer: Any, base: Path) -> None:
    """Losses are finite, every tensor of the adapter moves, no tensor of the base does."""
    model = trainer.model
    assert isinstance(model, PeftModel)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert len(losses(trainer)) == 2 and all(math.isfinite(loss) for loss in losses(trainer))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".moa." in name}
    untouched = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, untouched[name])


def sft(base: Path, folder: Path, kind: str, **options: Any) -> Any:
    model, tokenizer = load(base)
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**common(folder, **({"max_length": 24} | options))),
        train_dataset=datasets.Dataset.from_list(TEXTS),
        processing_class=tokenizer,
        peft_config=CONFIGS[kind](),
    )


@by_config
def test_sft(kind, base, tmp_path):
    check_training(sft(base, tmp_path, kind), base)


@by_config
def test_sft_with_gradient_checkpointing(kind, base, tmp_path):
    check_training(sft(base, tmp_path, kind, gradient_checkpointing=True), base)


@pytest.mark.filterwarnings("ignore:.*(padding-free|packing|Flash|flash).*")
@pytest.mark.parametrize(
    "options", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=["packing", "padding-free"]
)
@by_config
def test_sft_on_packed_rows(kind, options, base, tmp_path):
    check_training(sft(base, tmp_path, kind, **options), base)


@by_config
def test_sft_goes_on_from_a_checkpoint_as_if_never_stopped(kind, base, tmp_path):
    whole = sft(base, tmp_path / "whole", kind, max_steps=4)
    whole.train()
    first = sft(base, tmp_path / "halves", kind, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    checkpoint = tmp_path / "halves" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    second = sft(base, tmp_path / "halves", kind, max_steps=4)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert losses(second)[-2:] == losses(whole)[-2:]
    expected = dict(whole.model.named_parameters())
    for name, parameter in second.model.named_parameters():
        assert torch.equal(parameter, expected[name])


def test_sft_saves_what_it_trained(base, tmp_path):
    trainer = sft(base, tmp_path, "soft")
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert all(".moa." in name for name in load_file(tmp_path / "final" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "final")
    assert torch.equal(logits(again), logits(trainer.model.eval()))


def dpo(base: Path, folder: Path, kind: str, **options: Any) -> Any:
    model, tokenizer = load(base)
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**common(folder, max_length=32, **options)),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=CONFIGS[kind](),
    )


@by_config
def test_dpo(kind, base, tmp_path):
    trainer = dpo(base, tmp_path, kind)
    assert trainer.ref_model is None
    check_training(trainer, base)
    # The adapter starts at zero and the reference is the model without it: no preference, so ln 2.
    assert losses(trainer)[0] == pytest.approx(math.log(2.0), abs=1e-4)
    assert losses(trainer)[1] != pytest.approx(math.log(2.0), abs=1e-4)


def grpo(base: Path, folder: Path, kind: str, **options: Any) -> Any:
    model, tokenizer = load(base)
    settings = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "max_steps": 2}
    return trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(**common(folder, **(settings | options))),
        train_dataset=datasets.Dataset.from_list(PROMPTS),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **kwargs: [float(sum(map(ord, text)) % 17) for text in completions],
        peft_config=CONFIGS[kind](),
    )


@by_config
def test_grpo(kind, base, tmp_path):
    trainer = grpo(base, tmp_path, kind)
    assert trainer.ref_model is None
    check_training(trainer, base)
    divergence = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergence[0] == pytest.approx(0.0, abs=1e-6), "the reference is the model with the adapter switched off"
    assert divergence[1] > 1e-6


def test_the_reference_by_disabling_is_the_base_model(base, tmp_path):
    trainer = dpo(base, tmp_path, "soft")
    trainer.train()
    model = trainer.model.eval()
    untouched = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(logits(model), logits(untouched), atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(untouched))
    assert [m for m in model.modules() if isinstance(m, MoALayer)]


def test_sequence_granularity_says_that_it_needs_the_prompt(base, tmp_path):
    """Every token of a plain text is an answer, so there is no prompt to pool over."""
    model, tokenizer = load(base)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**common(tmp_path, max_length=24)),
        train_dataset=datasets.Dataset.from_list(TEXTS),
        processing_class=tokenizer,
        peft_config=soft(granularity="sequence"),
    )
    with pytest.raises(UserError, match="pools over the prompt"):
        trainer.train()
