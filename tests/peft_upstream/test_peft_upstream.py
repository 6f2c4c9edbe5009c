"""PEFT's own common tests, run on mixtures of adapters."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_peft import MoAConfig
from tests.models import tiny_model
from tests.peft_upstream import common
from tests.peft_upstream.fetch import COMMAND, upstream_folder

pytestmark = [
    pytest.mark.peft_upstream,
    pytest.mark.filterwarnings("ignore:.*has no site for.*:UserWarning"),
]

# PEFT leaves out Conv1D models for most methods by looking for "gpt2" in the model's name; here it must not.
FAMILIES = {"llama": "llama", "qwen3": "qwen3", "opt": "opt", "gpt2": "gpt-2", "gpt_neox": "gpt-neox"}
VARIANTS = ("soft", "sparse")
FETCHED = upstream_folder().is_dir()
CASES = common.discover(common.load()) if FETCHED else []


def _case_id(case: tuple[str, dict[str, Any]]) -> str:
    method, arguments = case
    return "-".join([method, *(f"{key}={str(value).removeprefix('torch.')}" for key, value in arguments.items())])


class Config(MoAConfig):
    """PEFT's tests build the configuration from a class and keywords; the presets are functions."""

    def __new__(cls, *, variant: str, **kwargs: Any) -> Any:
        return MoAConfig.preset(f"{variant}_moa", **kwargs)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved tiny model of every family."""
    root: Path = tmp_path_factory.mktemp("bases")
    for family, folder in FAMILIES.items():
        model = tiny_model(family)
        model.generation_config.max_new_tokens = 3
        model.save_pretrained(root / folder)
    return {family: str(root / folder) for family, folder in FAMILIES.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES, ids=_case_id)
def test_common(case: tuple[str, dict[str, Any]], family: str, variant: str, model_folders: dict[str, str]):
    method, arguments = case
    tester = common.make_tester(common.load())
    # PEFT's tests ask for weights that act at once, so that they can see whether the adapter does.
    options = {"variant": variant, "init": "normal", "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    call = {"model_id": model_folders[family], "config_cls": Config, "config_kwargs": options} | arguments
    getattr(tester, f"_test_{method}")(**call)


def test_the_tests_have_been_fetched():
    if FETCHED:
        assert len(CASES) >= 25
        return
    reason = f"PEFT's own tests are not in the cache; fetch them with: {COMMAND}"
    assert os.environ.get("CI") != "true", reason
    pytest.skip(reason)


@pytest.mark.skipif(not FETCHED, reason="PEFT's own tests are not in the cache")
def test_every_exclusion_is_a_method_of_the_class():
    assert set(common.EXCLUDED) <= set(common.method_names(common.load()))
