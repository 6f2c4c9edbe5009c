"""The recipe of a training run: what a YAML file and `--key value` flags may say, read into typed settings.

Top-level keys are ours (`RecipeOptions`) or the trainer's (`MoATrainingArguments`, that is every option of
`transformers.TrainingArguments` under its usual name); `data:` holds `DataOptions`; `moa:` holds the keys of the
method. On the command line a key in a block is written `--data.limit 100`, `--moa.rank 16`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser

from moa_peft.errors import UserError
from moa_peft.training.arguments import MoATrainingArguments
from moa_peft.training.option_checks import check_best_model, check_ranges, check_value

OWNED_BY_RUN = {
    "resume_from_checkpoint": "write resume: true (or --resume) to go on from the last checkpoint",
    "do_train": "`moa train` always trains",
    "do_eval": "validation is on when data.validation_size is not 0",
    "do_predict": "scoring a test set is the job of `moa eval`",
    "label_names": "labels are made from the answers",
    "remove_unused_columns": "the collator picks its columns itself",
    "disable_tqdm": "the progress display is our own",
    "hub_token": "log in with `hf auth login` or set HF_TOKEN, so that it is not written to run.json",
    "local_rank": "torchrun and accelerate launch set it",
}


@dataclass(kw_only=True)
class DataOptions:
    """The `data:` block."""

    path: str = field(metadata={"help": "JSON, JSONL or Parquet file, a folder of them, or a hub data set id."})
    split: str = field(default="train", metadata={"help": "Split of a hub data set or of a folder."})
    limit: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    validation_size: float = field(
        default=0.05, metadata={"help": "Rows split off train: a share below 1, else a number of rows; 0 for none."}
    )
    template: Literal["alpaca", "chat"] = field(default="alpaca", metadata={"help": "How a prompt is written."})
    max_length: int = field(default=512, metadata={"help": "Tokens of prompt and answer together."})
    loss_on: Literal["answer", "all"] = field(default="answer", metadata={"help": "Which tokens carry the loss."})
    too_long: Literal["shorten_prompt", "drop", "error"] = field(
        default="shorten_prompt", metadata={"help": "What happens to a row above max_length."}
    )

    def __post_init__(self) -> None:
        check_value(self.max_length >= 2, "data.max_length", self.max_length, "at least 2")
        check_value(
            self.limit is None or self.limit >= 1, "data.limit", self.limit, "at least 1, or null for all rows"
        )
        size = self.validation_size
        check_value(size >= 0, "data.validation_size", size, "0 for none, a share below 1, or a whole number of rows")
        check_value(
            size < 1 or size == int(size), "data.validation_size", size, "a share below 1 or a whole number of rows"
        )
        if not 0 < size < 1:
            self.validation_size = int(size)


@dataclass(kw_only=True)
class RecipeOptions:
    """The top-level keys that are ours."""

    model: str = field(metadata={"help": "Hub id, folder, or 'packaged' for the packaged Gemma 3 270M."})
    output_dir: str = field(metadata={"help": "Folder of the run: the adapter, run.json, recipe.yaml, checkpoints."})
    method: str = field(
        default="soft_moa", metadata={"help": "A method name (`moa methods`), or custom to write it out in moa:."}
    )
    init_from: str | None = field(
        default=None, metadata={"help": "LoRA adapter folder to start the LoRA experts from."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Storage type of the frozen base; auto: bfloat16 on a GPU, float32 on CPU."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    quantization: Literal["none", "8bit", "4bit"] = field(
        default="none", metadata={"help": "Quantise the frozen base with bitsandbytes."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier run in output_dir."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})


@dataclass(kw_only=True)
class TrainRecipe:
    """A checked recipe.

    Attributes:
        options: our own top-level keys.
        data: the `data:` block.
        moa: the `moa:` block, checked by the method itself.
        trainer: the trainer's options that were given, converted to their types.
    """

    options: RecipeOptions
    data: DataOptions
    moa: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a mapping that `parse_recipe` reads back to an equal one, without `overwrite` and `resume`."""
        options = {key: value for key, value in asdict(self.options).items() if key not in ("overwrite", "resume")}
        return {**options, "moa": self.moa, "data": asdict(self.data), **self.trainer}

    def training_arguments(self, *, checkpoints: Path, has_validation: bool) -> MoATrainingArguments:
        """Build the trainer's options.

        Args:
            checkpoints: the folder for checkpoints.
            has_validation: there are validation rows, so evaluate as often as checkpoints are saved and end with the
                best one, unless the recipe says otherwise.

        Raises:
            UserError: a combination of options that the trainer refuses.
        """
        given = dict(self.trainer)
        given.setdefault("report_to", _default_report_to())
        given.setdefault("save_strategy", "epoch")
        given.setdefault("dataloader_pin_memory", torch.cuda.is_available())
        if has_validation:
            given.setdefault("eval_strategy", given["save_strategy"])
            if given["eval_strategy"] == "steps" == given["save_strategy"]:
                given.setdefault("eval_steps", given.get("save_steps"))
            if given["eval_strategy"] != "no" and given["save_strategy"] != "no":
                given.setdefault("load_best_model_at_end", True)
        elif given.get("eval_strategy", "no") != "no":
            raise UserError(
                f"eval_strategy: {given['eval_strategy']!r} needs validation rows, but data.validation_size is 0.\n"
                "Set data.validation_size (for example 0.05), or eval_strategy: no"
            )
        check_best_model(given, has_validation=has_validation)
        if given.get("push_to_hub"):
            # The trainer's own default would be the name of the folder of the checkpoints.
            given.setdefault("hub_model_id", checkpoints.absolute().parent.name)
        try:
            return MoATrainingArguments(output_dir=str(checkpoints), **given)
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"recipe: {error}") from error


def load_recipe(path: str | Path, *, overrides: Sequence[str] = ()) -> TrainRecipe:
    """Read a recipe file and apply command-line overrides.

    Args:
        path: a YAML file.
        overrides: words such as `["--moa.rank", "16", "--resume"]`.

    Raises:
        UserError: the file is missing or no mapping, a key is unknown, or a value is not allowed.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"recipe: there is no file {str(path)!r}.\nGive a YAML file such as recipes/small/soft_moa.yaml"
        )
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe: {str(path)!r} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe: {str(path)!r} must hold 'key: value' lines, but is {_describe(content)}.")
    return parse_recipe(content, overrides=overrides)


def parse_recipe(content: Mapping[str, Any], *, overrides: Sequence[str] = ()) -> TrainRecipe:
    """Check a mapping of recipe keys, with overrides on top; see `load_recipe`.

    `null` stands for a key's default.
    """
    merged = _merge(content, parse_overrides(overrides))
    data = merged.pop("data", None)
    data = {"path": data} if isinstance(data, str) else data
    moa = merged.pop("moa", None) or {}
    for name, block in (("data", data), ("moa", moa)):
        if block is not None and not isinstance(block, dict):
            raise UserError(f"{name}: must be a block of 'key: value' lines, got {_describe(block)}.")
    option_names = {item.name for item in fields(RecipeOptions)}
    for key, advice in OWNED_BY_RUN.items():
        if key in merged:
            raise UserError(f"recipe: {key} cannot be set here; {advice}.")
    known = option_names | {item.name for item in fields(MoATrainingArguments) if item.init}
    _reject_unknown(merged, known - set(OWNED_BY_RUN), prefix="")
    _reject_unknown(data or {}, {item.name for item in fields(DataOptions)}, prefix="data.")
    own = {key: value for key, value in merged.items() if key in option_names}
    trainer = {key: value for key, value in merged.items() if key not in option_names}
    recipe = TrainRecipe(
        options=RecipeOptions(**_convert(RecipeOptions, own, prefix="")),
        data=DataOptions(**_convert(DataOptions, data or {}, prefix="data.")),
        moa=number_from(moa),
        trainer=_convert(MoATrainingArguments, trainer, prefix=""),
    )
    if recipe.options.overwrite and recipe.options.resume:
        raise UserError("recipe: overwrite and resume are both set. Keep the one you mean.")
    check_ranges(recipe.trainer)
    if recipe.trainer.get("save_total_limit") == 1:
        raise UserError("save_total_limit: 1 could delete the last checkpoint when another one is the best. Use 2.")
    return recipe


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Turn `--data.limit 100 --lr_scheduler_type=cosine --resume` into a nested mapping of strings.

    A key without a value means true; dashes in names count as underscores. Values in the `moa:` block are YAML.

    Raises:
        UserError: a word that is neither a key nor the value of one.
    """
    result: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--") or word == "--":
            raise UserError(f"command line: cannot use {word!r}; write overrides as --key value.")
        name, equals, value = word[2:].partition("=")
        position += 1
        if not equals:
            if position < len(words) and not words[position].startswith("--"):
                value = words[position]
                position += 1
            else:
                value = "true"
        keys = name.replace("-", "_").split(".")
        block = result
        for key in keys[:-1]:
            block = block.setdefault(key, {})
            if not isinstance(block, dict):
                raise UserError(f"command line: --{name} and --{key} contradict each other.")
        block[keys[-1]] = _yaml_value(name, value) if keys[0] == "moa" and len(keys) > 1 else value
    return result


class _RecipeParser(HfArgumentParser):
    """transformers' parser of dataclass fields, with errors as exceptions."""

    def error(self, message: str) -> Any:
        raise UserError(message)


def _convert(dataclass_type: Any, values: Mapping[str, Any], *, prefix: str) -> dict[str, Any]:
    """Convert the given values to the types of the dataclass's fields; null ones fall back to the default."""
    given = {key: value for key, value in values.items() if value is not None}
    parser = _RecipeParser(dataclass_type, add_help=False, allow_abbrev=False)
    required = [action.dest for action in parser._actions if action.required and action.dest not in given]
    if required:
        names = ", ".join(prefix + name for name in required)
        raise UserError(f"recipe: {names} must be set (in the file, or as --{prefix}{required[0]} VALUE).")
    hints = get_type_hints(dataclass_type)
    for key, value in given.items():
        _check_kind(prefix + key, value, hints[key], is_own=dataclass_type in (RecipeOptions, DataOptions))
    converted = {key: value for key, value in given.items() if isinstance(value, dict | list)}
    choices = {action.dest: action.choices or () for action in parser._actions}
    # YAML 1.1 reads the bare words no and off as false.
    given = {key: "no" if value is False and "no" in choices[key] else value for key, value in given.items()}
    words = [f"--{key}={_word(value)}" for key, value in given.items() if key not in converted]
    for action in parser._actions:
        action.required = False
    try:
        namespace = parser.parse_args(words)
    except UserError as error:
        raise UserError("recipe: " + re.sub(r"^argument --([^/:]+)[^:]*", prefix + r"\1", str(error))) from error
    return {key: converted.get(key, getattr(namespace, key)) for key in given}


def _check_kind(name: str, value: Any, hint: Any, *, is_own: bool) -> None:
    """Lists and blocks only where the option takes them; text keys of our own are not made of numbers silently."""
    kinds = {get_origin(item) or item for item in (get_args(hint) or (hint,))}
    if isinstance(value, dict | list) and type(value) not in kinds:
        found = "a block of 'key: value' lines" if isinstance(value, dict) else "a list"
        raise UserError(f"{name}: {value!r} is {found}; give a single value.")
    if is_own and kinds <= {str, type(None)} and not isinstance(value, str):
        raise UserError(f"{name}: {value!r} is no text. If it is meant as one, write it in quotes: '{_word(value)}'")


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _yaml_value(name: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"command line: the value of --{name} is no valid YAML: {text!r}") from error
    return number_from(value)


def number_from(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a string; make such strings the numbers they look like, in nested values too."""
    if isinstance(value, dict):
        return {key: number_from(item) for key, item in value.items()}
    if isinstance(value, list):
        return [number_from(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value.lower() not in ("inf", "nan") else value
        except ValueError:
            return value
    return value


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in overrides.items():
        if isinstance(value, dict):
            below = merged.get(key)
            if isinstance(below, str) and key == "data":
                below = {"path": below}
            merged[key] = _merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _reject_unknown(given: Mapping[str, Any], known: set[str], *, prefix: str) -> None:
    for key in given:
        if key not in known:
            candidates = [prefix + name for name in known]
            if not prefix:
                candidates += [f"data.{item.name}" for item in fields(DataOptions)]
            near = difflib.get_close_matches(f"{prefix}{key}", candidates, n=1, cutoff=0.6)
            same = [name for name in candidates if name.endswith(f".{key}")]
            found = (same or near or [None])[0]
            hint = f"Did you mean {found!r}?" if found else "`moa train --help` lists the keys."
            raise UserError(f"recipe: unknown key {prefix + str(key)!r}. {hint}")


def _describe(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def _default_report_to() -> str:
    from transformers.integrations.integration_utils import is_tensorboard_available

    return "tensorboard" if is_tensorboard_available() else "none"
