"""The file of a study: which rows are compared on which data, with which seeds, and what they share.

name: mixtures_on_math
baseline: soft_moa                  # the row that all others are compared with
recipe: {model: packaged, max_steps: 60, data: {template: alpaca, validation_size: 100}, ...}
data:
  math: {train: math/train.json, test: math, tasks: [MultiArith, AddSub], scorings: [nll, generate]}
seeds: [0, 1, 2]
rows:
  soft_moa: {}                      # the row's name is its method
  lora_matched: {method: lora, moa: {rank: 22}, matched_to: soft_moa}
search: {data: math, seed: 0, max_steps: 40, learning_rate: [3e-4, 1e-3, 3e-3]}
primary: nll
margin: 0.01
comparisons:
  - {question: "Is a matched LoRA worse?", rows: [lora_matched]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import yaml

from moa_peft.errors import UserError
from moa_peft.study.spec import ComparisonSpec, DataSpec, RowSpec, SearchSpec, StudySpec
from moa_peft.study.spec_checks import near
from moa_peft.training.recipe import number_from


def load_study(path: Path) -> StudySpec:
    """Read a study file; a model that is a folder beside it may be named relative to it.

    Raises:
        UserError: the file is missing or no mapping, a key is unknown or missing, a value is not allowed.
    """
    if not path.is_file():
        raise UserError(f"study: there is no file {str(path)!r}. Give a YAML file such as studies/smoke.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"study: {str(path)!r} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"study: {str(path)!r} must hold 'key: value' lines.")
    spec = parse_study(content, default_name=path.stem)
    beside = path.parent / str(spec.recipe.get("model", ""))
    if (beside / "config.json").is_file():
        spec = replace(spec, recipe={**spec.recipe, "model": str(beside)})
    return spec


def parse_study(content: Mapping[str, Any], *, default_name: str = "study") -> StudySpec:
    """Check the content of a study file; see `load_study`."""
    given = {"name": default_name, **number_from(dict(content))}
    for key in ("data", "rows", "recipe"):
        if not isinstance(given.get(key), dict) or not given[key]:
            raise UserError(f"study: {key} must be a block of 'name: settings'; see `moa compare --help`.")
    data = {name: _build(DataSpec, block, f"data.{name}") for name, block in given["data"].items()}
    rows = {
        name: _build(RowSpec, {"method": name, **_row_block(block, name)}, f"rows.{name}")
        for name, block in given["rows"].items()
    }
    search = given.get("search")
    asked = [] if given.get("comparisons") is None else given["comparisons"]
    if not isinstance(asked, list):
        raise UserError(f"study: comparisons must be a list of blocks with question and rows, got {asked!r}.")
    more = {
        "data": data,
        "rows": rows,
        "search": None if search is None else _build(SearchSpec, search, "search"),
        "comparisons": None,
    }
    spec: StudySpec = _build(StudySpec, {**given, **more}, "")
    questions = [_build(ComparisonSpec, block, f"comparisons[{number}]") for number, block in enumerate(asked)]
    return replace(spec, comparisons=tuple(questions))


def _row_block(block: Any, name: str) -> dict[str, Any]:
    if block is not None and not isinstance(block, dict):
        raise UserError(f"study: rows.{name} must be a block of 'key: value' lines or empty, got {block!r}.")
    return block or {}


def _build(kind: Any, block: Any, where: str) -> Any:
    """Make a dataclass of a block: unknown and missing keys are refused, lists become tuples, kinds are checked."""
    prefix = f"{where}." if where else ""
    if not isinstance(block, Mapping):
        raise UserError(f"study: {where} must be a block of 'key: value' lines, got {block!r}.")
    known = {item.name: item for item in fields(kind)}
    for key in block:
        if key not in known:
            raise UserError(f"study: unknown key {prefix}{key}. {near(str(key), known)}")
    values: dict[str, Any] = {}
    for name, item in known.items():
        has_default = item.default is not MISSING or item.default_factory is not MISSING
        value = block.get(name)
        if value is None:
            if not has_default:
                raise UserError(f"study: {prefix}{name} must be set.")
            continue
        kind_of_item = str(item.type).partition("[")[0].partition(" ")[0]
        values[name] = _converted(value, kind_of_item, str(item.type), prefix + name)
    return kind(**values)


def _converted(value: Any, kind: str, full: str, where: str) -> Any:
    if kind == "tuple":
        wanted = str if "str" in full else float if "float" in full else int
        if wanted is int and not isinstance(value, list | tuple):
            raise UserError(f"study: {where} must be a list, such as [0, 1, 2], got {value!r}.")
        entries = value if isinstance(value, list | tuple) else [value]
        found = tuple(_scalar(entry, wanted, where) for entry in entries)
        twice = next((entry for entry in found if found.count(entry) > 1), None)
        if twice is not None or not found:
            raise UserError(f"study: {where} {'is empty' if twice is None else f'has {twice!r} twice'}.")
        return found
    scalars = {"str": str, "int": int, "float": float}
    if kind in scalars:
        return _scalar(value, scalars[kind], where)
    if kind == "Mapping" and not isinstance(value, Mapping):
        raise UserError(f"study: {where} must be a block of 'key: value' lines, got {value!r}.")
    return value


def _scalar(value: Any, wanted: type, where: str) -> Any:
    allowed = (int, float) if wanted is float else (wanted,)
    if isinstance(value, bool) or not isinstance(value, allowed):
        names = {str: "text", int: "a whole number", float: "a number"}
        raise UserError(f"study: {where}: {value!r} must be {names[wanted]}.")
    if wanted is int and value < (0 if where.rpartition(".")[2] in ("seed", "seeds") else 1):
        raise UserError(f"study: {where}: {value} is too small.")
    return wanted(value)
