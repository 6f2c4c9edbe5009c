"""Import of libraries that only the `train` extra installs."""

import importlib
from typing import Any

from moa_peft.errors import UserError


def import_from_train_extra(name: str) -> Any:
    """Import a module of the `train` extra at the moment it is used.

    Raises:
        UserError: the library is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        library = name.partition(".")[0]
        raise UserError(f"This needs the library {library}: install it with `pip install moa-peft[train]`.") from error
