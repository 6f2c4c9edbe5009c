"""Traps of what a block shares, keeps or is copied with: several adapters, kept caches, copied modules, tracers."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import StaticCache

from moa_peft import MoAConfig, moa_status, plain_path
from tests.matrix import randomise_adapter
from tests.models import tiny_batch, tiny_model
from tests.native import CAUSAL, gradients, logits, soft, sparse, trained

WHERE = {"norm": "input_layernorm", "q_proj": "self_attn.q_proj", "down_proj": "mlp.down_proj"}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def lora_on(*targets: str) -> MoAConfig:
    return MoAConfig(experts=[{"type": "lora", "target": list(targets)}], **CAUSAL)


def decode(model: torch.nn.Module, cache: StaticCache, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the last token, read alone after the others."""
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)
        position = torch.full((ids.shape[0], 1), ids.shape[1] - 1)
        return model(input_ids=ids[:, -1:], past_key_values=cache, position_ids=position).logits


class TestAdaptersWithOtherSites:
    def test_generation_with_the_smaller_one(self):
        model = trained(config=lora_on("q", "v", "down"))
        model.add_adapter("small", lora_on("q"))
        randomise_adapter(model)
        ids = tiny_batch(tokens=5)["input_ids"]
        for active in ("small", ["default", "small"]):
            model.base_model.set_adapter(active)
            output = model.generate(input_ids=ids, **GREEDY)
            with plain_path(model):
                assert torch.equal(output, model.generate(input_ids=ids, **GREEDY))

    def test_after_the_larger_one_was_deleted(self):
        model = trained(config=lora_on("q", "v"))
        model.add_adapter("small", lora_on("q"))
        model.set_adapter("small")
        model.delete_adapter("default")
        randomise_adapter(model)
        output = model.generate(input_ids=tiny_batch(tokens=5)["input_ids"], **GREEDY)
        with plain_path(model):
            assert torch.equal(output, model.generate(input_ids=tiny_batch(tokens=5)["input_ids"], **GREEDY))


class TestKeptCaches:
    IDS = tiny_batch(rows=2, tokens=6)["input_ids"]

    def cache(self, model: torch.nn.Module) -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=16)

    def expected(self, model: torch.nn.Module) -> torch.Tensor:
        return logits(model, {"input_ids": self.IDS}, use_cache=False)[:, -1:]

    def assert_decodes_as_expected(self, model: torch.nn.Module, cache: StaticCache) -> None:
        cache.reset()
        torch.testing.assert_close(decode(model, cache, self.IDS), self.expected(model), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("change", ["in place", "other parameters", "other adapter"])
    def test_a_change_between_two_tokens(self, change):
        """Nothing is read in one go in between: what was packed for the first token must not serve the second."""
        model = trained(config=soft(prompt=False))
        model.add_adapter("other", sparse())
        randomise_adapter(model)
        logits_of = []
        for plain in (False, True):
            model.set_adapter("default")
            twin = copy.deepcopy(model)
            cache = self.cache(twin)
            with plain_path(twin) if plain else nullcontext():
                decode(twin, cache, self.IDS)
                if change == "in place":
                    randomise_adapter(twin, seed=4)
                elif change == "other parameters":
                    fresh = {
                        key: torch.nn.Parameter(p.detach() * -1.5)
                        for key, p in twin.named_parameters()
                        if ".moa." in key
                    }
                    for key, parameter in fresh.items():
                        owner, name = key.rsplit(".", 1)
                        setattr(twin.get_submodule(owner), name, parameter)
                else:
                    twin.set_adapter("other")
                with torch.no_grad():
                    position = torch.full((2, 1), self.IDS.shape[1])
                    output = twin(input_ids=self.IDS[:, :1], past_key_values=cache, position_ids=position)
            logits_of.append(output.logits)
        torch.testing.assert_close(logits_of[0], logits_of[1], atol=1e-5, rtol=1e-4)

    def test_other_parameters(self, tmp_path):
        model = trained()
        trained(seed=8).save_pretrained(tmp_path)
        cache = self.cache(model)
        decode(model, cache, self.IDS)
        model.load_adapter(tmp_path, "default", low_cpu_mem_usage=True)
        self.assert_decodes_as_expected(model.eval(), cache)

    def test_parameters_changed_behind_the_counters_back(self):
        model = trained()
        cache = self.cache(model)
        decode(model, cache, self.IDS)
        for name, parameter in model.named_parameters():
            if ".moa." in name:
                parameter.data.mul_(-1.0)
        self.assert_decodes_as_expected(model, cache)

    def test_deleted_adapters(self):
        model = trained()
        cache = self.cache(model)
        for seed in range(4):
            model.add_adapter("other", soft())
            randomise_adapter(model, seed=seed)
            model.set_adapter("other")
            self.assert_decodes_as_expected(model, cache)
            kept = [len(store) for store in cache.__dict__["moa_generation"].values()]
            model.set_adapter("default")
            model.delete_adapter("other")
            gc.collect()
        # The step, and the prompt's keys and values with and without its gate, of the adapter that ran last.
        assert kept == [3, 3]

    def test_training_mode_and_hooks_between_tokens(self):
        model = trained(config=soft(dropout=0.5))
        cache = self.cache(model)
        decode(model, cache, self.IDS)
        seen = []
        router = model.base_model.model.model.layers[0].moa.moa_router["default"]
        router.register_forward_hook(lambda module, args, output: seen.append(output))
        model.train()
        results = []
        for seed in (1, 2):
            cache.reset()
            torch.manual_seed(seed)
            results.append(decode(model, cache, self.IDS))
        assert not torch.allclose(results[0], results[1], atol=1e-4)
        assert len(seen) == 4

    def test_weights_made_in_inference_mode(self):
        with torch.inference_mode():
            model = trained()
            cache = self.cache(model)
            decode(model, cache, self.IDS)
            randomise_adapter(model, seed=3)
            self.assert_decodes_as_expected(model, cache)


class TestModulesToSaveInABlock:
    @pytest.mark.parametrize("name", ["norm", "input_layernorm", "q_proj", "down_proj", "mlp", "self_attn"])
    def test_the_experts_go_on_acting(self, name, tmp_path):
        torch.manual_seed(11)
        model = get_peft_model(tiny_model("llama"), soft(modules_to_save=[name]))
        randomise_adapter(model)
        model.train()(**tiny_batch()).loss.backward()
        found = gradients(model)
        wanted = {key for key, p in model.named_parameters() if ".moa." in key and p.requires_grad}
        assert wanted and all(found[key].abs().sum() > 0 for key in wanted)
        copied = [key for key in found if f"{name}.modules_to_save" in key or ".modules_to_save." in key]
        assert copied
        with plain_path(model):
            model(**tiny_batch()).loss.backward()
        torch.testing.assert_close(found, gradients(model), atol=2e-5, rtol=1e-3)
        model.eval().save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
        torch.testing.assert_close(logits(again), logits(model))
        base = logits(tiny_model("llama"))
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        if hasattr(tiny_model("llama").get_submodule(f"model.layers.0.{WHERE.get(name, name)}"), "weight"):
            # PEFT's unload asks every saved module for its weight.
            assert torch.equal(logits(model.unload()), base)

    def test_a_copy_of_the_model_is_independent(self):
        model = get_peft_model(tiny_model("llama"), soft(modules_to_save=["input_layernorm"]))
        randomise_adapter(model)
        expected = logits(model.eval())
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), expected)
        randomise_adapter(twin, seed=9)
        assert torch.equal(logits(model), expected)
        assert not torch.allclose(logits(twin), expected, atol=1e-3)
        with plain_path(twin):
            assert {part.obstacle for part in moa_status(twin).parts} == {"switched off"}
            assert {part.path for part in moa_status(model).parts} == {"fused"}


class TestTrainedTokens:
    @pytest.mark.parametrize("tokens", [{"embed_tokens": [3, 4]}, [3, 4]], ids=["by-module", "list"])
    def test_round_trip(self, tokens, tmp_path):
        model = get_peft_model(tiny_model("llama"), soft(trainable_token_indices=tokens))
        randomise_adapter(model)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
        torch.testing.assert_close(logits(again), logits(model.eval()))

    def test_tied_weights(self, tmp_path):
        config = soft(trainable_token_indices=[3], ensure_weight_tying=True)
        get_peft_model(self.tied(), config).save_pretrained(tmp_path)
        PeftModel.from_pretrained(self.tied(), tmp_path)

    def tied(self) -> torch.nn.Module:
        model = tiny_model("llama")
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    def test_a_second_adapter(self, tmp_path):
        model = get_peft_model(tiny_model("llama"), soft(trainable_token_indices=[3, 4]))
        model.save_pretrained(tmp_path)
        model.add_adapter("second", soft())
        model.load_adapter(tmp_path, "third")
        assert set(model.peft_config) == {"default", "second", "third"}


class TestTracersAndTransforms:
    def test_a_forward_with_fake_tensors_leaves_nothing_behind(self):
        model = trained()
        twin = copy.deepcopy(model)
        ids = tiny_batch()["input_ids"]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            model(mode.from_tensor(ids))
        assert torch.equal(logits(model), logits(twin))

    def test_training_on_the_meta_device(self):
        model = trained().train().to("meta")
        batch = {key: value.to("meta") for key, value in tiny_batch().items() if key != "attention_mask"}
        assert model(**batch).loss.device.type == "meta"

    def test_functional_gradients(self):
        model = trained(config=soft(prompt=False))
        name = next(key for key, p in model.named_parameters() if "lora_o.lora_B" in key and p.requires_grad)
        batch = tiny_batch()

        def loss(value: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, {name: value}, (), batch).loss

        found = torch.func.grad(loss)(dict(model.named_parameters())[name].detach())
        model(**batch).loss.backward()
        torch.testing.assert_close(found, gradients(model)[name], atol=1e-5, rtol=1e-3)

    def test_backward_after_a_functional_call(self):
        model = trained()
        gates = {
            key: torch.full_like(p, 0.7).requires_grad_()
            for key, p in model.named_parameters()
            if key.endswith("gate")
        }
        batch, found = tiny_batch(), []
        for context in (nullcontext(), plain_path(model)):
            with context:
                torch.func.functional_call(model, gates, (), batch).loss.backward()
            found.append({key: gate.grad for key, gate in gates.items()} | gradients(model))
            gates = {key: gate.detach().requires_grad_() for key, gate in gates.items()}
        torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-3)

    def test_a_hook_on_every_module_sees_what_modules_return(self):
        base, model = tiny_model("llama"), trained()
        seen: list[torch.Tensor] = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append(output) if module is watched else None
        )
        try:
            for root in (base, model.base_model.model):
                watched = root.model.layers[0].self_attn.q_proj
                logits(root)
        finally:
            handle.remove()
        assert torch.equal(seen[0], seen[1])
