"""Writing files so that a reader never sees half of one; refusing places that cannot be written; a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from moa_peft.errors import UserError


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


def check_creatable(path: Path, *, setting: str) -> None:
    """Refuse a file or folder that could not be created, before the work whose result it is to hold.

    Args:
        path: what is going to be created or replaced; it need not exist.
        setting: how messages name the setting, for example ``--output``.

    Raises:
        UserError: a part of the path is a link into nowhere, a file, too long, or a folder without permission.
    """
    try:
        for place in (path, *path.absolute().parents):
            if place.exists():
                break
            if place.is_symlink():
                raise UserError(
                    f"{setting}: {str(place)!r} is a link to {os.readlink(place)!r}, which does not exist.\n"
                    "Remove the link, create what it points to, or give another path."
                )
        else:
            place = Path.cwd()
    except OSError as error:
        raise UserError(f"{setting}: {str(path)!r} cannot be used: {error.strerror}. Give another path.") from error
    if place != path and not place.is_dir():
        raise UserError(f"{setting}: {str(path)!r} cannot be created, because {str(place)!r} is a file.")
    if not os.access(place, os.W_OK):
        raise UserError(
            f"{setting}: {str(path)!r} cannot be written (no permission in {str(place)!r}). Give another path, or "
            "change its permissions."
        )


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
