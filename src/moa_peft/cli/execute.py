"""`moa exec`: run another Python program with the method registered in its process.

PEFT has no plug-in mechanism, so a program that never imports moa_peft cannot load our adapters by itself.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated

import typer

from moa_peft.errors import UserError


def execute(
    program: Annotated[
        list[str],
        typer.Argument(help="A command, `python -m MODULE`, or a .py file, and its arguments.", metavar="PROGRAM ..."),
    ],
) -> None:
    """Run another program that can then load, train and serve our adapters.

    **Examples**

        moa exec -- lm-eval --model hf --model_args pretrained=Qwen/Qwen3-0.6B,peft=runs/qwen --tasks gsm8k

        moa exec -- trl sft --config sft.yaml

        moa exec -- python -m my_package.train --flag

        moa exec -- my_script.py --flag
    """
    import moa_peft  # the import registers the method

    _register_in_children(Path(moa_peft.__file__).parent / "child_processes")
    name, arguments = program[0], program[1:]
    if name in ("python", "python3", Path(sys.executable).name):
        if len(arguments) >= 2 and arguments[0] == "-m":
            _run_module(arguments[1], arguments[2:])
            return
        if not arguments or arguments[0].startswith("-"):
            raise UserError(
                "exec: after python, give -m MODULE or a .py file; other options of python are not passed."
            )
        name, arguments = arguments[0], arguments[1:]
    if name.endswith(".py"):
        _run_file(name, arguments)
        return
    found = _console_script(name)
    if found is None:
        raise UserError(
            f"exec: {name!r} is no Python command installed in this environment, no module and no .py file.\n"
            "Check its name with `pip list`, install it, or write: moa exec -- python -m MODULE ..."
        )
    function = found.load()
    sys.argv = [name, *arguments]
    code = function()
    if code is not None:
        raise SystemExit(code)


def _register_in_children(folder: Path) -> None:
    """Processes that the program starts (accelerate's launcher does) register too; see the file in `folder`."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])


def _console_script(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group="console_scripts", name=name)), None)


def _run_module(name: str, arguments: list[str]) -> None:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(
            f"exec: there is no Python module {name!r} in this environment. Check its name, or install it."
        )
    sys.path.insert(0, os.getcwd())
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_file(name: str, arguments: list[str]) -> None:
    if not Path(name).is_file():
        raise UserError(f"exec: there is no file {name!r}.")
    sys.path.insert(0, str(Path(name).resolve().parent))
    sys.argv = [name, *arguments]
    runpy.run_path(name, run_name="__main__")
