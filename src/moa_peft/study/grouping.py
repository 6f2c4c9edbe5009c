"""The runs of a study, data set by data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moa_peft.errors import UserError
from moa_peft.study.records import MissingRun, RunRecord


@dataclass(frozen=True, kw_only=True)
class DataSetRuns:
    """The runs on one data set, finished and missing."""

    data: str
    records: Sequence[RunRecord]
    missing: Sequence[MissingRun]

    @property
    def rows(self) -> list[str]:
        """Rows in the order of their first run, those without any run last."""
        return list(dict.fromkeys(run.row for run in (*self.records, *self.missing)))

    def runs(self, row: str) -> dict[int, RunRecord]:
        """The finished runs of a row by seed."""
        return {run.seed: run for run in sorted(self.records, key=lambda run: run.seed) if run.row == row}

    def asked_seeds(self, row: str) -> set[int]:
        """The seeds of a row, finished or missing."""
        return self.runs(row).keys() | {run.seed for run in self.missing if run.row == row}

    def paired_seeds(self, row: str, other: str) -> list[int]:
        """The seeds that both rows have."""
        return sorted(self.runs(row).keys() & self.runs(other).keys())

    def only(self, rows: Sequence[str]) -> DataSetRuns:
        """The runs of some rows, in the order given."""
        return DataSetRuns(
            data=self.data,
            records=[run for row in rows for run in self.records if run.row == row],
            missing=[run for row in rows for run in self.missing if run.row == row],
        )


def group_by_data(records: Sequence[RunRecord], missing: Sequence[MissingRun], *, baseline: str) -> list[DataSetRuns]:
    """Runs by data set, in the order of their first run.

    Raises:
        UserError: the baseline is no row, or a run is given twice.
    """
    rows = dict.fromkeys(run.row for run in (*records, *missing))
    if baseline not in rows:
        raise UserError(
            f"baseline is {baseline!r}, but no run has this row. Rows: {', '.join(rows)}. Give one of them."
        )
    places = [(run.row, run.data, run.seed) for run in (*records, *missing)]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise UserError(f"row {twice[0]!r} on {twice[1]!r} has seed {twice[2]} twice; give every run once.")
    return [
        DataSetRuns(
            data=data,
            records=[record for record in records if record.data == data],
            missing=[run for run in missing if run.data == data],
        )
        for data in dict.fromkeys(run.data for run in (*records, *missing))
    ]
