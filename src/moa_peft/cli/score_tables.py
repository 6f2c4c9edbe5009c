"""Tables of scores for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from moa_peft.harness_results import HarnessResult
    from moa_peft.intervals import Interval

_ACCURACIES = {"strict": "strict %", "flexible": "flexible %", "legacy": "legacy %", "choice": "choice %"}


def score_tables(
    results: Mapping[str, Mapping[str, Any]], means: Mapping[str, Mapping[str, Any]], *, title: str
) -> list[Table]:
    """One table for each way of scoring.

    Args:
        results: by set and way of scoring, from `score_sets`.
        means: by suite, from `suite_means`.
        title: printed above.
    """
    tables = []
    for scoring in dict.fromkeys(scoring for content in results.values() for scoring in content):
        chosen = {name: content[scoring] for name, content in results.items() if scoring in content}
        table = _nll_table(chosen) if scoring == "nll" else _accuracy_table(chosen)
        table.title = escape(f"{title}: {scoring}")
        for suite, values in means.items():
            cells = _mean_cells(scoring, values, next(iter(chosen.values())))
            if cells:
                table.add_section()
                table.add_row(f"mean of {len(values['sets'])} {suite} sets", *cells)
        tables.append(table)
    return tables


def code_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """pass@k of code tasks, with why samples did not pass."""
    table = Table("set", title="programs that pass their tests")
    for column in ("problems", "samples", "pass@", "%", "95 % interval"):
        table.add_column(column, justify="right")
    table.add_column("endings")
    for name, content in scores.items():
        endings = ", ".join(f"{reason} {count}" for reason, count in content["reasons"].items())
        for k, estimate in content["pass_at"].items():
            interval = estimate["interval_95"]
            shown = "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
            cells = [name, f"{content['num_problems']:,}", f"{content['num_samples']:,}", k]
            table.add_row(*cells, f"{100 * estimate['value']:.1f}", shown, escape(endings))
    return table


def harness_table(result: HarnessResult) -> Table:
    """Scores of lm-evaluation-harness, with its own metrics and standard errors."""
    table = Table("task", "metric", "filter", title="lm-evaluation-harness")
    for column in ("value", "95 % interval", "questions"):
        table.add_column(column, justify="right")
    for row in result.rows():
        interval, questions = row["interval"], row["questions"]
        shown = "" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"
        count = "" if questions is None else f"{questions:,}"
        cells = [row["task"], row["metric"], row["filter"], f"{row['value']:.4f}", shown, count]
        table.add_row(*(escape(str(cell)) for cell in cells))
    return table


def format_interval(interval: Interval) -> str:
    """`3.1 to 12.5`, in percent or points."""
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _accuracy_table(chosen: Mapping[str, Mapping[str, Any]]) -> Table:
    modes = _modes(next(iter(chosen.values())))
    table = Table("set")
    for column in ("items", _ACCURACIES[modes[0]], "95 % interval", *(_ACCURACIES[mode] for mode in modes[1:])):
        table.add_column(column, justify="right")
    table.add_column("missing", justify="right")
    for name, content in _with_parts(chosen):
        first = content[modes[0]]
        interval = first["interval_95"]
        table.add_row(
            escape(name),
            f"{content['num_items']:,}",
            f"{100 * first['accuracy']:.1f}",
            f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f}",
            *(f"{100 * content[mode]['accuracy']:.1f}" for mode in modes[1:]),
            f"{first['missing']:,}",
        )
    return table


def _nll_table(chosen: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("set")
    for column in ("items", "nats per token", "95 % interval", "nats per answer", "left out"):
        table.add_column(column, justify="right")
    for name, content in _with_parts(chosen):
        interval = content["interval_95"]
        table.add_row(
            escape(name),
            f"{content['num_items']:,}",
            f"{content['nll']:.4f}",
            f"{interval['low']:.4f} to {interval['high']:.4f}",
            f"{content['nll_per_answer']:.2f}",
            f"{content['left_out']:,}" if "left_out" in content else "",
        )
    return table


def _with_parts(chosen: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for name, content in chosen.items():
        rows.append((name, content))
        rows += [(f"  {part}", amounts) for part, amounts in content.get("parts", {}).items()]
    return rows


def _mean_cells(scoring: str, values: Mapping[str, Any], example: Mapping[str, Any]) -> list[str]:
    if scoring == "nll":
        return ["", f"{values['nll']:.4f}", "", "", ""] if "nll" in values else []
    shares = [values.get(f"{scoring}.{mode}") for mode in _modes(example)]
    if None in shares:
        return []
    first, *rest = [f"{100 * share:.1f}" for share in shares if share is not None]
    return ["", first, "", *rest, ""]


def _modes(content: Mapping[str, Any]) -> list[str]:
    return [mode for mode in _ACCURACIES if mode in content]
