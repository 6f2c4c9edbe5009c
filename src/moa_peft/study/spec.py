"""A study: which rows are compared on which data, with which seeds, and what they share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moa_peft.study.spec_checks import check_study


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
        note: what the row is for, printed above the tables.
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
        recipe: further keys of a recipe for all tries.
    """

    data: str
    learning_rate: tuple[float, ...]
    max_steps: int
    seed: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)


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
        check_study(self)

    def to_dict(self) -> dict[str, Any]:
        """The study as plain values, for result files."""
        return asdict(self)

    def rows_on(self, data: str) -> list[str]:
        """The rows that run on a data set, in the study's order."""
        chosen = self.data[data].rows
        return [name for name in self.rows if chosen is None or name in chosen]

    def recipe_on(self, data: str, row: str | None = None, *, is_search: bool = False) -> dict[str, Any]:
        """Keys of a recipe: the study's, over them the data set's, those of the search, and the row's."""
        recipe = _merged(self.recipe, self.data[data].recipe)
        if is_search and self.search is not None:
            recipe = _merged(recipe, self.search.recipe)
        return recipe if row is None else _merged(recipe, self.rows[row].recipe)

    def seeds_of(self, row: str, data: str) -> tuple[int, ...]:
        """The seeds of a row on a data set: its own, else the data set's, else the study's."""
        return self.rows[row].seeds or self.data[data].seeds or self.seeds


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged
