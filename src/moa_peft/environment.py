"""What a result depends on besides its settings: the versions of the libraries."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("moa-peft", "torch", "transformers", "peft", "accelerate", "trl", "datasets", "scipy")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that results depend on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
