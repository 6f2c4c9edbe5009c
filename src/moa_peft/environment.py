"""What a result depends on besides its settings (versions of libraries), and what it cost (peak memory)."""

from __future__ import annotations

import platform
import sys
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


def peak_memory_bytes() -> int | None:
    """Peak resident memory of this process; None on systems without `getrusage`."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
