"""What the pictures of a study share: matplotlib where it is installed, and files that are the same every time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moa_peft.errors import UserError

_FORMATS = (".png", ".svg")


def import_matplotlib() -> Any:
    """Matplotlib with the parts that the pictures use; a `UserError` unless it is installed."""
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.lines
        import matplotlib.ticker
        import matplotlib.transforms
    except ImportError as error:
        raise UserError("plot: pictures need matplotlib. Run: pip install 'moa-peft[plot]'") from error
    return matplotlib


def check_format(path: Path) -> None:
    """Refuse a file whose ending is none of a picture's.

    Raises:
        UserError: naming the endings that are.
    """
    if path.suffix not in _FORMATS:
        raise UserError(f"path is {str(path)!r}; a plot is written as {' or '.join(_FORMATS)}. Give another ending.")


def save_figure(figure: Any, path: Path) -> None:
    """Write under a temporary name, then rename; without dates or random ids in the file."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with import_matplotlib().rc_context({"svg.hashsalt": "moa"}):
            figure.savefig(temporary, metadata={"Date": None} if path.suffix == ".svg" else None)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
