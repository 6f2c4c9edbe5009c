"""Writing files so that a reader never sees half of one, and telling a full disk from other errors."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: str) -> None:
    """Write text to a temporary name beside `path`, then rename it over `path`.

    Args:
        path: the file to write; its folder exists.
        content: the whole new content.

    Raises:
        OSError: the file system refused; `path` then keeps its old content and no temporary file is left.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes private files; a result is readable like any other file of the user.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def existing_parent(path: Path) -> Path:
    """`path` itself, or the nearest folder above it that exists."""
    for candidate in (path, *path.absolute().parents):
        if candidate.exists():
            return candidate
    return Path.cwd()


def move_files(source: Path, destination: Path) -> None:
    """Rename everything in the folder `source` into `destination`, replacing what has the same name.

    Args:
        source: a folder on the same file system; it is removed afterwards.
        destination: an existing folder.
    """
    for file in sorted(source.iterdir()):
        target = destination / file.name
        if file.is_dir() and target.is_dir():
            shutil.rmtree(target)
        os.replace(file, target)
    source.rmdir()


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or one it was raised from, says that the disk or the quota is full.

    safetensors and torch.save report the operating system's error as text only, so the message counts too.
    """
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(current) or "Disk quota exceeded" in str(current):
            return True
        current = current.__cause__ or current.__context__
    return False
