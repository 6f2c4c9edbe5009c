"""What a study must keep to, beyond the kinds of its values."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moa_peft.errors import UserError
from moa_peft.evaluation.predictions import KINDS
from moa_peft.study.records import PRIMARY_MEASURES

if TYPE_CHECKING:
    from moa_peft.study.spec import ComparisonSpec, StudySpec

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SCORED_BY = {
    "nll": "nll",
    "accuracy_strict": "generate",
    "accuracy_flexible": "generate",
    "accuracy": "loglikelihood",
}
_ONE_MODEL = ("model", "revision", "dtype", "quantization")
_ONE_BUDGET = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "data",
    "train_sampling_strategy",
    "data_seed",
    "dataloader_drop_last",
    "auto_find_batch_size",
    "init_from",
)
_LAST_WEIGHTS = "the weights of the last step count"
_SET_BY_STUDY = {
    "output_dir": "the study's --output decides it",
    "seed": "the key seeds lists them",
    "method": "every row names its method",
    "moa": "every row has its own block moa",
    "overwrite": "results are never overwritten",
    "resume": "a study always goes on where it stopped",
    "eval_strategy": _LAST_WEIGHTS,
    "eval_steps": _LAST_WEIGHTS,
    "load_best_model_at_end": _LAST_WEIGHTS,
}
_SET_BY_DATA = {
    "path": "data.*.train says where the rows are",
    "split": "studies train on the split train",
    "limit": "data.*.train_rows draws a sample",
}


def check_study(spec: StudySpec) -> None:
    """Refuse a study that contradicts itself, or asks what its runs could not answer.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    _check_names(spec)
    _check_numbers(spec)
    _check_rows(spec)
    _check_data(spec)
    _check_recipes(spec)
    _check_search(spec)
    _check_pairs(spec)
    questions = [asked.question for asked in spec.comparisons]
    for number, asked in enumerate(spec.comparisons):
        if questions.count(asked.question) > 1:
            raise UserError(f"study: comparisons: the question {asked.question!r} is asked twice.")
        _check_comparison(spec, asked, f"comparisons[{number}]")


def near(name: str, known: Iterable[Any]) -> str:
    """A hint for a name that is not known: the nearest one that is, or all of them."""
    known = [str(item) for item in known]
    matches = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {matches[0]!r}?" if matches else f"There are: {', '.join(known)}."


def _check_names(spec: StudySpec) -> None:
    for name in (*spec.rows, *spec.data):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"study: the name {name!r} is not allowed; use letters, digits, _ and - (in quotes, where YAML would "
                "read a number or a truth value)."
            )
    if spec.baseline not in spec.rows:
        raise UserError(f"study: baseline {spec.baseline!r} is no row. {near(spec.baseline, spec.rows)}")
    if spec.primary not in PRIMARY_MEASURES:
        raise UserError(f"study: primary {spec.primary!r} is not allowed; give one of {', '.join(PRIMARY_MEASURES)}.")


def _check_numbers(spec: StudySpec) -> None:
    if spec.margin is not None and not 0 < spec.margin < math.inf:
        raise UserError(f"study: margin {spec.margin} is not allowed; give more than 0, or leave it out.")
    if not 0 <= spec.parameter_tolerance < math.inf:
        raise UserError(
            f"study: parameter_tolerance {spec.parameter_tolerance} is not allowed; give 0.05 for five percent."
        )


def _check_rows(spec: StudySpec) -> None:
    for name, row in spec.rows.items():
        for key in ("matched_to", "learning_rate_of"):
            other = getattr(row, key)
            if other is not None and (other not in spec.rows or other == name):
                raise UserError(f"study: rows.{name}.{key}: {other!r} is no other row. {near(other, spec.rows)}")
        if row.learning_rate_of is not None and spec.rows[row.learning_rate_of].learning_rate_of is not None:
            raise UserError(
                f"study: rows.{name}.learning_rate_of: {row.learning_rate_of!r} takes its rate from another row "
                "itself. Name that row."
            )


def _check_data(spec: StudySpec) -> None:
    for name, data in spec.data.items():
        unknown = [row for row in data.rows or () if row not in spec.rows]
        if unknown:
            raise UserError(f"study: data.{name}.rows: {unknown[0]!r} is no row. {near(unknown[0], spec.rows)}")
        if data.rows is not None and spec.baseline not in data.rows:
            raise UserError(f"study: data.{name}.rows must name the baseline {spec.baseline!r} too.")
        wrong = [scoring for scoring in data.scorings if scoring not in KINDS]
        if wrong or not data.scorings:
            raise UserError(f"study: data.{name}.scorings: {wrong!r} is not allowed; give of {', '.join(KINDS)}.")
        if _SCORED_BY[spec.primary] not in data.scorings:
            raise UserError(
                f"study: primary {spec.primary!r} is measured by {_SCORED_BY[spec.primary]}, which "
                f"data.{name}.scorings lacks. Add it, or choose another measure."
            )
    for name in spec.rows:
        if not any(name in spec.rows_on(data) for data in spec.data):
            raise UserError(f"study: the row {name!r} is on no data set. Name it in data.*.rows, or remove it.")


def _recipes(spec: StudySpec) -> dict[str, Mapping[str, Any]]:
    return {
        "recipe": spec.recipe,
        **({} if spec.search is None else {"search.recipe": spec.search.recipe}),
        **{f"data.{name}.recipe": data.recipe for name, data in spec.data.items()},
        **{f"rows.{name}.recipe": row.recipe for name, row in spec.rows.items()},
    }


def _check_recipes(spec: StudySpec) -> None:
    for where, recipe in _recipes(spec).items():
        if not isinstance(recipe.get("data", {}), Mapping):
            raise UserError(f"study: {where}.data must be a block of 'key: value' lines, got {recipe['data']!r}.")
        for key, advice in _SET_BY_STUDY.items():
            if key in recipe:
                raise UserError(f"study: {where}.{key} cannot be set; {advice}.")
        for key, advice in _SET_BY_DATA.items():
            if key in recipe.get("data", {}):
                raise UserError(f"study: {where}.data.{key} cannot be set; {advice}.")
        if where != "recipe" and (shared := [key for key in _ONE_MODEL if key in recipe]):
            raise UserError(f"study: {where}.{shared[0]} cannot be set; a study has one model.")
        if where.startswith("rows.") and (shared := [key for key in _ONE_BUDGET if key in recipe]):
            raise UserError(f"study: {where}.{shared[0]} cannot be set; all rows have one budget.")


def _check_search(spec: StudySpec) -> None:
    if spec.search is None:
        borrowed = next((name for name, row in spec.rows.items() if row.learning_rate_of is not None), None)
        if borrowed is not None:
            raise UserError(
                f"study: rows.{borrowed}.learning_rate_of needs a search, which the study lacks. Set "
                f"rows.{borrowed}.recipe.learning_rate instead."
            )
        return
    if spec.search.data not in spec.data:
        raise UserError(f"study: search.data {spec.search.data!r} is no data set. {near(spec.search.data, spec.data)}")
    twice = next((where for where, recipe in _recipes(spec).items() if "learning_rate" in recipe), None)
    if twice is not None:
        raise UserError(f"study: {twice}.learning_rate and search are both given. Keep one.")
    for name, row in spec.rows.items():
        source = row.learning_rate_of or name
        if source not in spec.rows_on(spec.search.data):
            raise UserError(
                f"study: rows.{name}: {source!r} is not on {spec.search.data!r}, where learning rates are searched. "
                "Add it there, or set learning_rate_of to a row that is."
            )


def _check_pairs(spec: StudySpec) -> None:
    for data in spec.data:
        shared = set(spec.seeds_of(spec.baseline, data))
        alone = [row for row in spec.rows_on(data) if not shared & set(spec.seeds_of(row, data))]
        if alone:
            raise UserError(
                f"study: rows.{alone[0]}.seeds has no seed in common with the baseline on {data!r}, so there is "
                "nothing to pair. Give it one of the baseline's."
            )


def _check_comparison(spec: StudySpec, asked: ComparisonSpec, where: str) -> None:
    baseline = asked.baseline or spec.baseline
    for name in (baseline, *asked.rows):
        if name not in spec.rows:
            raise UserError(f"study: {where}: {name!r} is no row. {near(name, spec.rows)}")
    if baseline in asked.rows:
        raise UserError(f"study: {where}.rows: {baseline!r} is what the rows are compared with. Leave it out.")
    for row in asked.rows:
        shared = [data for data in spec.data if {row, baseline} <= set(spec.rows_on(data))]
        paired = [data for data in shared if set(spec.seeds_of(row, data)) & set(spec.seeds_of(baseline, data))]
        if not paired:
            raise UserError(
                f"study: {where}: {row!r} and {baseline!r} have no data set and seed in common, so there is nothing "
                "to pair. Give them one, or leave the row out."
            )
