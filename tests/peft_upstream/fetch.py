"""Fetch PEFT's own tests: its source distribution for the installed version, checked by SHA-256.

The wheel has no tests, the source distribution does. Nothing of it is kept in this repository: ``tests/`` is unpacked
into a cache folder, once. Run it with ``python -m tests.peft_upstream.fetch``.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

SHA256 = {"0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"}
"""Digest of ``peft-VERSION.tar.gz`` for every version these tests have been run with."""

CACHE = Path(__file__).parent / ".cache"
COMMAND = "python -m tests.peft_upstream.fetch"


class FetchError(Exception):
    """The source distribution could not be fetched, or is not the one expected."""


def upstream_folder(cache: Path = CACHE) -> Path:
    """Where the tests of the installed PEFT are, or will be."""
    return cache / f"peft-{version('peft')}" / "tests"


def fetch(cache: Path = CACHE) -> Path:
    """Make sure that the tests of the installed PEFT are in the cache.

    Args:
        cache: folder that holds one folder per version.

    Returns:
        The folder with ``testing_common.py``.

    Raises:
        FetchError: for a version without a known digest, a failed download, or a wrong digest.
    """
    folder = upstream_folder(cache)
    if folder.is_dir():
        return folder
    release = version("peft")
    if release not in SHA256:
        raise FetchError(
            f"The digest of PEFT {release} is not known (known: {', '.join(SHA256)}). Install one of these, or look "
            f"the archive over and add its SHA-256 to {Path(__file__).name}."
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as workspace:
        archive = _download(release, Path(workspace))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != SHA256[release]:
            raise FetchError(f"{archive.name} has the SHA-256 {digest}; expected {SHA256[release]}. It is not used.")
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(f"peft-{release}/tests/")]
            tar.extractall(workspace, members=members, filter="data")
        unpacked = Path(workspace) / f"peft-{release}"
        shutil.rmtree(folder.parent, ignore_errors=True)
        os.replace(unpacked, folder.parent)
    return folder


def _download(release: str, destination: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", f"peft=={release}", "--no-deps", "--no-binary", ":all:"]
    command += ["--dest", str(destination), "--quiet"]
    # pip asks the archive for its metadata; with setuptools at hand that needs no further download.
    if importlib.util.find_spec("setuptools"):
        command.append("--no-build-isolation")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise FetchError(f"pip could not download the source distribution of PEFT {release}:\n{result.stderr.strip()}")
    return destination / f"peft-{release}.tar.gz"


def main() -> int:
    """Command line: fetch, say where the tests are, return the exit code."""
    parser = argparse.ArgumentParser(description="Fetch PEFT's own tests for the installed version.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder to unpack into")
    try:
        print(fetch(parser.parse_args().cache))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
