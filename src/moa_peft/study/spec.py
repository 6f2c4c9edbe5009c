"""A study: which rows are compared on which data, with which seeds, and what they share."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moa_peft.errors import UserError
from moa_peft.evaluation.predictions import KINDS
from moa_peft.study.records import PRIMARY_MEASURES

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ONE_BUDGET = {"max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "data"}
_SCORED_BY = {
    "nll": "nll",
    "accuracy_strict": "generate",
    "accuracy_flexible": "generate",
    "accuracy": "loglikelihood",
}
_SET_BY_STUDY = {
    "output_dir": "the study's --output decides it",
    "seed": "the key seeds lists them",
    "method": "every row names its method",
    "moa": "every row has its own block moa",
    "overwrite": "results are never overwritten",
    "resume": "a study always goes on where it stopped",
}


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """One data set of a study.

    Attributes:
        train: file or folder of training rows, below the folder given by `--data` (or a hub id).
        test: folder of the test sets, below the folder given by `--data` (or a hub id).
        tasks: names of question sets, or suites.
        scorings: how they are scored: `nll`, `generate`, `loglikelihood`.
        transfer: tasks of whose kind there are no training rows; they are reported apart from the average.
        generate_tasks: the question sets that `generate` is for, the slowest way of scoring; None for all.
        train_rows: a fixed sample of so many training rows; None for all.
        test_rows: a fixed sample of so many rows of every test set; None for all.
        max_new_tokens: longest generated answer; None for what each task needs.
        batch_size: questions at a time.
        rows: rows of the study that run on this data; None for all.
        seeds: seeds on this data; None for the study's.
        recipe: further keys of a recipe for all runs on this data.
    """

    train: str
    test: str
    tasks: tuple[str, ...]
    scorings: tuple[str, ...] = ("nll", "generate")
    transfer: tuple[str, ...] = ()
    generate_tasks: tuple[str, ...] | None = None
    train_rows: int | None = None
    test_rows: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 32
    rows: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """One row of the table: a method with its settings.

    Attributes:
        method: a name of `moa methods`, or custom.
        moa: the method's keys.
        recipe: further keys of a recipe for this row.
        matched_to: another row whose number of trainable parameters this one must have, within the tolerance.
        learning_rate_of: another row whose learning rate is taken, instead of a search of its own.
        seeds: the row's seeds; None for the study's.
        note: what the row is for, printed below the table.
    """

    method: str
    moa: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    matched_to: str | None = None
    learning_rate_of: str | None = None
    seeds: tuple[int, ...] | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ComparisonSpec:
    """One question of the study, a family of tests of its own.

    Attributes:
        question: heading of its table.
        rows: the rows that are compared.
        baseline: the row that they are compared with; None for the study's.
    """

    question: str
    rows: tuple[str, ...]
    baseline: str | None = None


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """The search for a learning rate: the same tries for every row, decided by validation loss.

    Attributes:
        data: the data set it is made on; its outcome holds for all.
        learning_rate: the values tried.
        max_steps: steps of a try.
        seed: the seed of all tries.
    """

    data: str
    learning_rate: tuple[float, ...]
    max_steps: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """A checked study.

    Attributes:
        name: what the report calls it.
        baseline: the row that all others are compared with.
        recipe: keys of a recipe that all runs share.
        data: data sets by name.
        rows: rows by name.
        seeds: seeds of initial weights, order of rows and the validation split.
        search: how learning rates are found; None takes the recipe's.
        primary: the measure that is compared: nll, or an accuracy.
        margin: differences below it do not matter; None where none is asked about.
        parameter_tolerance: relative difference of trainable parameters that `matched_to` allows.
        question: what the study asks, printed above the tables.
        comparisons: its single questions, each with a table and corrected p values of its own; without any, all rows
            against the baseline are one question.
    """

    name: str
    baseline: str
    recipe: Mapping[str, Any]
    data: Mapping[str, DataSpec]
    rows: Mapping[str, RowSpec]
    seeds: tuple[int, ...]
    search: SearchSpec | None = None
    primary: str = "nll"
    margin: float | None = None
    parameter_tolerance: float = 0.05
    question: str = ""
    comparisons: tuple[ComparisonSpec, ...] = ()

    def __post_init__(self) -> None:
        wrong_name = next((name for name in (*self.rows, *self.data) if not _NAME.fullmatch(name)), None)
        if wrong_name is not None:
            raise UserError(f"study: the name {wrong_name!r} is not allowed; use letters, digits, _ and -.")
        if self.baseline not in self.rows:
            raise UserError(f"study: baseline {self.baseline!r} is no row. {near(self.baseline, self.rows)}")
        for name, row in self.rows.items():
            for key in ("matched_to", "learning_rate_of"):
                other = getattr(row, key)
                if other is not None and (other not in self.rows or other == name):
                    raise UserError(f"study: rows.{name}.{key}: {other!r} is no other row. {near(other, self.rows)}")
            if row.learning_rate_of is not None and self.rows[row.learning_rate_of].learning_rate_of is not None:
                raise UserError(
                    f"study: rows.{name}.learning_rate_of: {row.learning_rate_of!r} takes its rate from another row "
                    "itself. Name that row."
                )
        for name, data in self.data.items():
            unknown = [row for row in data.rows or () if row not in self.rows]
            if unknown:
                raise UserError(f"study: data.{name}.rows: {unknown[0]!r} is no row. {near(unknown[0], self.rows)}")
            if data.rows is not None and self.baseline not in data.rows:
                raise UserError(f"study: data.{name}.rows must name the baseline {self.baseline!r} too.")
            wrong = [scoring for scoring in data.scorings if scoring not in KINDS]
            if wrong or not data.scorings:
                raise UserError(f"study: data.{name}.scorings: {wrong!r} is not allowed; give of {', '.join(KINDS)}.")
            if "model" in data.recipe:
                raise UserError(f"study: data.{name}.recipe.model cannot be set; a study has one model.")
        recipes = {
            "recipe": self.recipe,
            **{f"data.{name}.recipe": data.recipe for name, data in self.data.items()},
            **{f"rows.{name}.recipe": row.recipe for name, row in self.rows.items()},
        }
        if self.search is not None:
            if self.search.data not in self.data:
                raise UserError(
                    f"study: search.data {self.search.data!r} is no data set. {near(self.search.data, self.data)}"
                )
            twice = next((where for where, recipe in recipes.items() if "learning_rate" in recipe), None)
            if twice is not None:
                raise UserError(f"study: {twice}.learning_rate and search are both given. Keep one.")
        for name, row in self.rows.items():
            shared = sorted(_ONE_BUDGET & row.recipe.keys())
            if shared:
                raise UserError(f"study: rows.{name}.recipe.{shared[0]} cannot be set; all rows have one budget.")
            if not any(name in self.rows_on(data) for data in self.data):
                raise UserError(f"study: the row {name!r} is on no data set. Name it in data.*.rows, or remove it.")
            source = row.learning_rate_of or name
            if self.search is not None and source not in self.rows_on(self.search.data):
                raise UserError(
                    f"study: rows.{name}: {source!r} is not on {self.search.data!r}, where learning rates are "
                    "searched. Add it there, or set learning_rate_of to a row that is."
                )
        for key, advice in _SET_BY_STUDY.items():
            for where, recipe in recipes.items():
                if key in recipe:
                    raise UserError(f"study: {where}.{key} cannot be set; {advice}.")
        if self.primary not in PRIMARY_MEASURES:
            raise UserError(
                f"study: primary {self.primary!r} is not allowed; give one of {', '.join(PRIMARY_MEASURES)}."
            )
        for data in self.data:
            shared = set(self.seeds_of(self.baseline, data))
            alone = [row for row in self.rows_on(data) if not shared & set(self.seeds_of(row, data))]
            if alone:
                raise UserError(
                    f"study: rows.{alone[0]}.seeds has no seed in common with the baseline on {data!r}, so there is "
                    "nothing to pair. Give it one of the baseline's."
                )
        for name, data in self.data.items():
            if _SCORED_BY[self.primary] not in data.scorings:
                raise UserError(
                    f"study: primary {self.primary!r} is measured by {_SCORED_BY[self.primary]}, which "
                    f"data.{name}.scorings lacks. Add it, or choose another measure."
                )
        if self.margin is not None and not self.margin > 0:
            raise UserError(f"study: margin {self.margin} is not allowed; give more than 0, or leave it out.")

        for number, asked in enumerate(self.comparisons):
            self._check_comparison(asked, f"comparisons[{number}]")

    def _check_comparison(self, asked: ComparisonSpec, where: str) -> None:
        baseline = asked.baseline or self.baseline
        for name in (baseline, *asked.rows):
            if name not in self.rows:
                raise UserError(f"study: {where}: {name!r} is no row. {near(name, self.rows)}")
        if baseline in asked.rows:
            raise UserError(f"study: {where}.rows: {baseline!r} is what the rows are compared with. Leave it out.")
        for row in asked.rows:
            shared = [data for data in self.data if {row, baseline} <= set(self.rows_on(data))]
            paired = [data for data in shared if set(self.seeds_of(row, data)) & set(self.seeds_of(baseline, data))]
            if not paired:
                raise UserError(
                    f"study: {where}: {row!r} and {baseline!r} have no data set and seed in common, so there is "
                    "nothing to pair. Give them one, or leave the row out."
                )

    def to_dict(self) -> dict[str, Any]:
        """The study as plain values, for result files."""
        return asdict(self)

    def rows_on(self, data: str) -> list[str]:
        """The rows that run on a data set, in the study's order."""
        chosen = self.data[data].rows
        return [name for name in self.rows if chosen is None or name in chosen]

    def recipe_on(self, data: str, row: str | None = None) -> dict[str, Any]:
        """Keys of a recipe: the study's, over them the data set's, over them the row's."""
        recipe = _merged(self.recipe, self.data[data].recipe)
        return recipe if row is None else _merged(recipe, self.rows[row].recipe)

    def seeds_of(self, row: str, data: str) -> tuple[int, ...]:
        """The seeds of a row on a data set: its own, else the data set's, else the study's."""
        return self.rows[row].seeds or self.data[data].seeds or self.seeds


def near(name: str, known: Iterable[Any]) -> str:
    """A hint for a name that is not known: the nearest one that is, or all of them."""
    known = [str(item) for item in known]
    matches = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {matches[0]!r}?" if matches else f"There are: {', '.join(known)}."


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged
