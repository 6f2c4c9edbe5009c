"""Whether the rows of a study had the same budget: steps, rows and tokens seen, and trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moa_peft.errors import UserError
from moa_peft.study.records import RunRecord

_SPENT = {"steps": "steps", "rows_seen": "rows seen", "tokens": "tokens seen"}


@dataclass(frozen=True, kw_only=True)
class BudgetMismatch:
    """One quantity that should be equal and is not.

    Attributes:
        data: the data set of the runs.
        seed: their seed; None where runs of all seeds are concerned.
        quantity: what differs, for example "tokens seen".
        values: the number of every row concerned; where a row differs from itself, of every one of its seeds.
        allowed: what was asked for, for example "equal for all rows".
    """

    data: str
    seed: int | None
    quantity: str
    values: Mapping[str, int]
    allowed: str

    @property
    def sentence(self) -> str:
        """The mismatch for a reader: where, what, every value, and what was asked for."""
        where = self.data if self.seed is None else f"{self.data}, seed {self.seed}"
        names: dict[int, list[str]] = {}
        for name, value in self.values.items():
            names.setdefault(value, []).append(name)
        values = "; ".join(f"{value:,} ({', '.join(of_value)})" for value, of_value in names.items())
        return f"{where}: {self.quantity} differ: {values}. Asked for: {self.allowed}."


def check_budgets(
    records: Sequence[RunRecord], *, matched: Mapping[str, str], tolerance: float
) -> list[BudgetMismatch]:
    """Compare what the runs spent.

    Within a data set and seed, all rows must have equal steps, rows seen and tokens seen. Within a data set, the runs
    of a row must have equal trainable parameters, and those of a row named in `matched` must lie within `tolerance` of
    the other row's: |a - b| <= tolerance b. Runs without trainable parameters spent nothing and are left out. A row
    of `matched` without a finished run on a data set is not compared there.

    Args:
        records: the finished runs.
        matched: row -> the row whose number of trainable parameters it is to have.
        tolerance: relative, for example 0.05.

    Returns:
        Every mismatch, data set by data set; an empty list where the budgets match.

    Raises:
        UserError: the tolerance is negative.
    """
    if not tolerance >= 0:
        raise UserError(f"tolerance is {tolerance!r}; it must be at least 0, for example 0.05 for five percent.")
    trained = [record for record in records if record.trainable_parameters > 0]
    mismatches = []
    for data in dict.fromkeys(record.data for record in trained):
        runs = [record for record in trained if record.data == data]
        mismatches += _spent(runs)
        mismatches += _parameters(runs, matched=matched, tolerance=tolerance)
    return mismatches


def _spent(runs: Sequence[RunRecord]) -> list[BudgetMismatch]:
    mismatches = []
    for seed in sorted({run.seed for run in runs}):
        for field, quantity in _SPENT.items():
            values = {run.row: getattr(run, field) for run in runs if run.seed == seed}
            if len(set(values.values())) > 1:
                mismatches.append(
                    BudgetMismatch(
                        data=runs[0].data, seed=seed, quantity=quantity, values=values, allowed="equal for all rows"
                    )
                )
    return mismatches


def _parameters(runs: Sequence[RunRecord], *, matched: Mapping[str, str], tolerance: float) -> list[BudgetMismatch]:
    mismatches = []
    parameters: dict[str, int] = {}
    for row in dict.fromkeys(run.row for run in runs):
        of_seeds = {f"{row}, seed {run.seed}": run.trainable_parameters for run in runs if run.row == row}
        parameters[row] = next(iter(of_seeds.values()))
        if len(set(of_seeds.values())) > 1:
            mismatches.append(_parameter_mismatch(runs[0].data, of_seeds, allowed="equal for all seeds"))
    for row, other in matched.items():
        if row not in parameters or other not in parameters:
            continue
        if abs(parameters[row] - parameters[other]) > tolerance * parameters[other]:
            values = {name: parameters[name] for name in (row, other)}
            mismatches.append(
                _parameter_mismatch(runs[0].data, values, allowed=f"{row} within {tolerance:.3g} of {other}, relative")
            )
    return mismatches


def _parameter_mismatch(data: str, values: Mapping[str, int], *, allowed: str) -> BudgetMismatch:
    return BudgetMismatch(data=data, seed=None, quantity="trainable parameters", values=values, allowed=allowed)
