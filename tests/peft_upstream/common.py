"""Loading PEFT's common test class, and what each of its methods needs here."""

import contextlib
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.peft_upstream.fetch import upstream_folder

PACKAGE = "peft_upstream_tests"

EXCLUDED = {
    "merge_layers": "a mixture cannot be merged",
    "merge_layers_fp16": "a mixture cannot be merged",
    "merge_layers_is_idempotent": "a mixture cannot be merged",
    "merge_layers_multi": "a mixture cannot be merged",
    "merge_layers_nan": "a mixture cannot be merged",
    "safe_merge": "a mixture cannot be merged",
    "weighted_combination_of_adapters": "adapters of LoRA and IA3 are merged; skips every other method",
    "weighted_combination_of_adapters_lora": "helper of weighted_combination_of_adapters",
    "weighted_combination_of_adapters_ia3": "helper of weighted_combination_of_adapters",
    "lora_conversion": "needs a weight difference, which a mixture does not have; checks nothing for other methods",
    "mixed_adapter_batches": "LoRA and RoAD only; skips every other method",
    "generate_with_mixed_adapter_batches_and_beam_search": "LoRA only; skips every other method",
    "training_prompt_learning_tasks": "prompt learning only; skips every other method",
    "training_layer_indexing": "needs the option layers_to_transform; skips a method without it",
    "adding_multiple_adapters_with_bias_raises": "needs the option bias; skips a method without it",
}
"""Methods of the common class that are not run, with the reason."""

ARGUMENTS: dict[str, list[Any]] = {
    "safe_serialization": [True, False],
    "dtype": [torch.bfloat16, torch.float16],
    "use_reentrant": [True, False],
    "raises_err": [False],
    "test_name": [""],
}
"""Values of the arguments that methods take beside the model and the configuration: each value is a test."""

_GIVEN = ("self", "model_id", "config_cls", "config_kwargs")


def load() -> types.ModuleType:
    """PEFT's ``testing_common`` from the cache.

    It imports diffusers, for which a stub stands in, and would switch the model hub on and off around every test,
    which is left out: every model here is a local folder.
    """
    if f"{PACKAGE}.testing_common" in sys.modules:
        return sys.modules[f"{PACKAGE}.testing_common"]
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(upstream_folder())]
    sys.modules[PACKAGE] = package
    with _stub_of_diffusers():
        common = importlib.import_module(f"{PACKAGE}.testing_common")
    vars(common)["hub_online_once"] = lambda *args, **kwargs: contextlib.nullcontext()
    return common


@contextlib.contextmanager
def _stub_of_diffusers() -> Iterator[None]:
    before = sys.modules.get("diffusers")
    stub = types.ModuleType("diffusers")
    vars(stub)["StableDiffusionPipeline"] = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = stub
    try:
        yield
    finally:
        # transformers asks sys.modules what is installed, so the stub must not stay.
        if before is None:
            del sys.modules["diffusers"]
        else:
            sys.modules["diffusers"] = before


def make_tester(common: types.ModuleType) -> Any:
    """An instance of the common class for decoders."""

    class DecoderTester(common.PeftCommonTester):
        transformers_class = AutoModelForCausalLM

        def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
            input_ids = torch.tensor([[1, 4, 1, 7], [5, 2, 1, 3]])
            attention_mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
            return {"input_ids": input_ids, "attention_mask": attention_mask}

    return DecoderTester()


def discover(common: types.ModuleType) -> list[tuple[str, dict[str, Any]]]:
    """Every method that is run, by name, once per combination of its further arguments.

    Raises:
        LookupError: if a method takes an argument that `ARGUMENTS` does not know.
    """
    cases: list[tuple[str, dict[str, Any]]] = []
    for method in method_names(common):
        if method in EXCLUDED:
            continue
        function: Callable[..., Any] = getattr(common.PeftCommonTester, f"_test_{method}")
        combinations: list[dict[str, Any]] = [{}]
        for argument in inspect.signature(function).parameters:
            if argument in _GIVEN:
                continue
            if argument not in ARGUMENTS:
                raise LookupError(f"_test_{method} takes {argument!r}: say in ARGUMENTS what to call it with.")
            combinations = [given | {argument: value} for given in combinations for value in ARGUMENTS[argument]]
        cases += [(method, given) for given in combinations]
    return cases


def method_names(common: types.ModuleType) -> list[str]:
    """The names of all test methods of the common class, without their prefix."""
    names = [name for name in vars(common.PeftCommonTester) if name.startswith("_test_")]
    return [name.removeprefix("_test_") for name in names]
