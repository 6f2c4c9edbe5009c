"""The fused path equals the plain one in value and gradient, and gives way where it does not apply."""

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from moa_peft import MoAConfig, moa_status, plain_path
from moa_peft.layer import MoALayer
from moa_peft.products import SharedInput
from tests.matrix import CASES, FAMILIES, VARIANTS, Family, Variant, adapted, randomise_adapter
from tests.models import tiny_batch, tiny_model
from tests.native import CAUSAL, gradients, logits, soft, sparse, trained

pytestmark = pytest.mark.filterwarnings("ignore:.*has no site for.*:UserWarning")
GATED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "olmo2",
    "granite",
    "smollm3",
)


def step(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = model(**tiny_batch())
    output.loss.backward()
    return output.logits.detach(), gradients(model)


def obstacles(model: nn.Module) -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {}
    for part in moa_status(model).parts:
        found.setdefault(part.part, set()).add(part.obstacle)
    return found


def plain_parts(model: nn.Module) -> set[str]:
    return {part.part for part in moa_status(model).parts if part.path == "plain"}


@pytest.mark.parametrize(("variant", "family"), CASES, ids=[f"{v.name}-{f.name}" for v, f in CASES])
def test_values_and_gradients_are_those_of_the_plain_path(variant: Variant, family: Family):
    model = adapted(variant, family).train()
    values, fused = step(model)
    with plain_path(model):
        expected, plain = step(model)
    torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-4)
    assert set(fused) == set(plain)
    for name in plain:
        torch.testing.assert_close(
            fused[name], plain[name], atol=2e-5, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name in ("soft", "heterogeneous")], ids=lambda v: v.name)
def test_a_bfloat16_base(variant: Variant, name: str, autocast: bool):
    family = next(family for family in FAMILIES if family.name == name)
    model = adapted(variant, family, dtype=torch.bfloat16).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        values, fused = step(model)
        with plain_path(model):
            expected, plain = step(model)
    torch.testing.assert_close(values.float(), expected.float(), atol=0.1, rtol=0.05)
    flat, reference = (torch.cat([grads[n].flatten() for n in plain]) for grads in (fused, plain))
    assert {gradient.dtype for gradient in fused.values()} == {torch.float32}
    assert torch.nn.functional.cosine_similarity(flat, reference, dim=0) > 0.999


def test_a_float32_base_under_autocast():
    model = trained("llama").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, fused = step(model)
        with plain_path(model):
            expected, plain = step(model)
    torch.testing.assert_close(values.float(), expected.float(), atol=0.1, rtol=0.05)
    flat, reference = (torch.cat([grads[n].flatten() for n in plain]) for grads in (fused, plain))
    assert torch.nn.functional.cosine_similarity(flat, reference, dim=0) > 0.999


def test_two_adapters_at_once():
    model = trained()
    model.add_adapter("other", sparse(prompt=True))
    randomise_adapter(model)
    model.base_model.set_adapter(["default", "other"])
    values, fused = step(model.train())
    with plain_path(model):
        expected, plain = step(model)
    torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-4)
    assert any(".other." in name for name in plain) and any(".default." in name for name in plain)
    torch.testing.assert_close(fused, plain, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", GATED)
def test_everything_is_fused_in_families_with_a_gated_mlp(name):
    model = trained(name)
    assert plain_parts(model) - {"router"} == set()
    # Without a norm before attention the router reads something of its own.
    assert ("router" in plain_parts(model)) == (name == "olmo2")


def test_the_status_names_blocks_parts_and_reasons():
    model = trained("gpt2")
    parts = {part.part: part for part in model.moa_status().parts if part.block.endswith("h.1")}
    assert parts["router"].path == parts["lora_q_k_v"].path == "fused"
    assert parts["mlp"].path == "plain" and "act(gate)" in str(parts["mlp"].obstacle)
    text = str(model.moa_status())
    assert "lora_q_k_v" in text and "plain: it is not down(act(gate) * up)" in text
    with plain_path(model):
        assert {part.obstacle for part in moa_status(model).parts if part.part != "mlp"} == {"switched off"}
    with pytest.raises(ValueError, match="no mixture"):
        moa_status(tiny_model("llama"))


class TestItGivesWay:
    def test_dropout_in_training(self):
        model = trained(config=soft(dropout=0.4))
        assert plain_parts(model.eval()) == set()
        assert plain_parts(model.train()) == set()
        torch.manual_seed(1)
        first = model(**tiny_batch()).loss
        torch.manual_seed(2)
        assert not torch.equal(first, model(**tiny_batch()).loss)

    @pytest.mark.parametrize(
        "path", ["moa_experts.default.lora_o.lora_A", "moa_experts.default.lora_o", "moa_router.default.head.w1"]
    )
    def test_a_hook_on_a_layer_of_ours_is_called(self, path):
        model = trained()
        expected = logits(model)
        seen = []
        layers = [module for module in model.modules() if isinstance(module, MoALayer)]
        layers[0].get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
        torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
        assert len(seen) == 1

    @pytest.mark.parametrize("path", ["self_attn.q_proj", "mlp.down_proj"])
    def test_a_hook_on_the_models_own_layer_sees_what_it_saw(self, path):
        """In place changes must not reach what a hook before ours has kept."""
        config = MoAConfig(experts=[{"type": "lora", "target": "q"}, {"type": "parallel", "size": 4}], **CAUSAL)
        model = trained(config=config)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        layer = model.base_model.model.model.layers[0].get_submodule(path)
        hook = layer.register_forward_hook(lambda m, a, output: kept.append((output, output.detach().clone())))
        layer._forward_hooks.move_to_end(hook.id, last=False)
        logits(model)
        model.train()(**tiny_batch())
        assert len(kept) == 2
        for seen, then in kept:
            assert torch.equal(seen, then)

    def test_hooks_on_the_mlp_are_called(self):
        model = trained().train()
        expected = step(model)
        mlp = model.base_model.model.model.layers[0].mlp
        seen = []
        mlp.act_fn.register_forward_hook(lambda module, args, output: seen.append("act"))
        mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append("down"))
        torch.testing.assert_close(step(model), expected, atol=2e-5, rtol=1e-3)
        assert seen == ["act", "down"]

    def test_a_trained_down_projection_gets_its_gradient(self):
        model = trained().train()
        weight = model.base_model.model.model.layers[1].mlp.down_proj.weight.requires_grad_()
        model(**tiny_batch()).loss.backward()
        fused = weight.grad
        weight.grad = None
        with plain_path(model):
            model(**tiny_batch()).loss.backward()
        assert fused is not None and weight.grad is not None
        torch.testing.assert_close(fused, weight.grad)

    def test_an_unknown_activation(self):
        model = trained().train()
        model.base_model.model.model.layers[0].mlp.act_fn = nn.Tanh()
        assert any("Tanh" in str(reason) for reason in obstacles(model)["mlp"])
        values, fused = step(model)
        with plain_path(model):
            expected, plain = step(model)
        torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(fused, plain, atol=2e-5, rtol=1e-3)


def test_the_mlp_keeps_gate_and_up_only():
    """Nothing else as wide as the MLP is kept for the backward pass."""
    widths: dict[bool, int] = {}
    for plain in (False, True):
        model = trained(config=soft(prompt=False)).train()
        width = model.base_model.model.config.intermediate_size
        kept = {}

        def pack(tensor: torch.Tensor, kept: dict = kept, width: int = width) -> torch.Tensor:
            if tensor.numel() == tiny_batch()["input_ids"].numel() * width and tensor.shape[-1] == width:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if plain:
                with plain_path(model):
                    model(**tiny_batch())
            else:
                model(**tiny_batch())
        widths[plain] = len(kept) // model.base_model.model.config.num_hidden_layers
    assert widths == {False: 2, True: 4}


def test_shared_reads_take_one_product():
    calls: list[tuple[int, ...]] = []
    model = trained(config=MoAConfig(experts=[{"type": "lora", "target": ["q", "k", "v"], "num": 3}], **CAUSAL))

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear:
                calls.append(tuple(args[1].shape))
            return func(*args, **(kwargs or {}))

    with Count():
        logits(model)
    layers = model.base_model.model.config.num_hidden_layers
    hidden = model.base_model.model.config.hidden_size
    # Nine experts of rank 8 and the two layers of the router, of four per expert.
    assert calls.count((9 * 8 + 2 * 4 * 9, hidden)) == layers
    assert not [shape for shape in calls if shape in ((8, hidden), (36, hidden))]


def test_threads_share_one_model():
    model = trained(config=soft())
    batches = [tiny_batch(seed=seed) for seed in range(4)]
    expected = [logits(model, batch) for batch in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(15):
            if not torch.equal(logits(model, batches[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_change_of_weights_between_generations_is_noticed():
    model = trained()
    batch = {key: value for key, value in tiny_batch(tokens=5).items() if key != "labels"}
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    model.generate(**batch, **settings)
    randomise_adapter(model, seed=9)
    again = torch.stack(model.generate(**batch, **settings).logits)
    fresh = trained()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(again, torch.stack(fresh.generate(**batch, **settings).logits))


def test_training_after_generation_in_inference_mode():
    model, fresh = trained(), trained()
    with torch.inference_mode():
        model.generate(input_ids=tiny_batch(tokens=5)["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(step(model.train())[1], step(fresh.train())[1])


class TestSkipping:
    """Large sites of a sparse mixture read and add to the tokens that have a weight there, and to no others."""

    BATCH = {"rows": 4, "tokens": 40}

    def mixture(self, *, gradient: str, threshold: float = 0.6) -> nn.Module:
        experts = [
            {"type": "lora", "target": ["q", "o", "gate", "down"], "rank": 40},
            {"type": "lora", "target": "v", "rank": 4},
            {"type": "parallel", "size": 48},
            {"type": "prompt", "length": 3},
        ]
        router = {
            "type": "sigmoid",
            "threshold": "constant",
            "max_threshold": threshold,
            "threshold_gradient": gradient,
        }
        return trained(config=MoAConfig(experts=experts, router=router, **CAUSAL)).train()

    def skipping(self, model: nn.Module) -> set[str]:
        return {part.part for part in moa_status(model).parts if part.skips}

    @pytest.mark.parametrize("threshold", [0.6, 0.999, 0.001], ids=["some", "none", "all"])
    @pytest.mark.parametrize("gradient", ["none", "shifted"])
    def test_values_and_gradients_are_those_of_the_plain_path(self, gradient, threshold):
        model = self.mixture(gradient=gradient, threshold=threshold)
        assert self.skipping(model) == {"lora_q", "lora_o", "lora_gate", "parallel_adapter"}
        batch = tiny_batch(**self.BATCH)
        results = []
        for plain in (False, True):
            with plain_path(model) if plain else nullcontext():
                output = model(**batch)
                output.loss.backward()
            results.append((output.logits.detach(), gradients(model)))
        torch.testing.assert_close(results[0][0], results[1][0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(results[0][1], results[1][1], atol=2e-5, rtol=1e-3)

    def test_the_straight_through_estimate_needs_every_token_in_training(self):
        model = self.mixture(gradient="straight_through")
        assert self.skipping(model) == set()
        with torch.no_grad():
            assert "lora_q" in self.skipping(model)
        assert "leaves out" not in str(model.moa_status())

    def test_inference_leaves_tokens_out(self):
        model = self.mixture(gradient="straight_through").eval()
        batch = tiny_batch(**self.BATCH)
        rows: list[int] = []

        class Count(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func is torch.nn.functional.linear and args[1].shape[0] == 40:
                    rows.append(args[0].numel() // args[0].shape[-1])
                return func(*args, **(kwargs or {}))

        with Count():
            values = logits(model, batch)
        with plain_path(model):
            torch.testing.assert_close(values, logits(model, batch), atol=2e-5, rtol=1e-4)
        tokens = batch["input_ids"].numel()
        assert min(rows) < 0.6 * tokens
        assert all(count <= 0.6 * tokens or count == tokens for count in rows)

    @pytest.mark.parametrize(("rows", "asked"), [(1, False), (4, True)], ids=["few", "many"])
    def test_few_tokens_are_not_worth_it(self, rows, asked, monkeypatch):
        model = self.mixture(gradient="none").eval()
        counted = []
        original = SharedInput.active_tokens
        monkeypatch.setattr(SharedInput, "active_tokens", lambda *args: counted.append(1) or original(*args))
        logits(model, tiny_batch(rows=rows, tokens=40))
        assert bool(counted) == asked

    def test_soft_mixtures_never_skip(self):
        model = trained(config=MoAConfig(experts=[{"type": "lora", "target": "q", "rank": 64}], **CAUSAL))
        assert self.skipping(model) == set()
