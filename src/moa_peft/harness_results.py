"""What lm-evaluation-harness found: scores with intervals, ready for tables and JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from numbers import Real
from typing import Any

from moa_peft.intervals import Interval

_TWO_SIDED_95 = 1.96
_STDERR = "_stderr"


@dataclass(frozen=True, kw_only=True)
class HarnessScore:
    """A metric of a task.

    Attributes:
        value: as the harness gives it: a share for accuracies, but not for every metric (perplexity).
        stderr: its standard error, None where the harness has none.
    """

    value: float
    stderr: float | None

    @property
    def interval(self) -> Interval | None:
        """95 % interval ``value +- 1.96 stderr``; it may reach beyond the metric's range."""
        if self.stderr is None or not math.isfinite(self.stderr):
            return None
        margin = _TWO_SIDED_95 * self.stderr
        return Interval(low=self.value - margin, high=self.value + margin)


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """What the harness found.

    Attributes:
        scores: task or group, then ``"metric,filter"`` (such as ``"acc,none"``), to the score.
        versions: task or group to the version its definition states.
        n_samples: task to its number of questions, ``original`` and, after `limit`, ``effective``.
        configs: task to its whole definition, the number of examples in the prompt included.
        samples: task to one record per question and filter, with prompt, answer and metrics; empty if not logged.
        harness_version: version of lm_eval.
    """

    scores: dict[str, dict[str, HarnessScore]]
    versions: dict[str, Any]
    n_samples: dict[str, dict[str, int]]
    configs: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    harness_version: str

    def rows(self) -> list[dict[str, Any]]:
        """One row per score for a table: task, version, num_fewshot, questions, metric, filter, value, interval."""
        rows = []
        for task, scores in self.scores.items():
            for key, score in scores.items():
                metric, _, name = key.partition(",")
                row = {
                    "task": task,
                    "version": self.versions.get(task),
                    "num_fewshot": self.configs.get(task, {}).get("num_fewshot"),
                    "questions": self.n_samples.get(task, {}).get("effective"),
                    "metric": metric,
                    "filter": name,
                    "value": score.value,
                    "interval": score.interval,
                }
                rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, ready for JSON; numbers that JSON does not have (NaN) are None."""
        scores = {
            task: {
                key: {
                    "value": score.value,
                    "stderr": score.stderr,
                    "interval_95": None if score.interval is None else asdict(score.interval),
                }
                for key, score in found.items()
            }
            for task, found in self.scores.items()
        }
        return {
            "lm_eval": self.harness_version,
            "scores": _json_ready(scores),
            "versions": self.versions,
            "n_samples": self.n_samples,
            "configs": self.configs,
        }


def read_results(found: dict[str, Any]) -> HarnessResult:
    """What the harness's `evaluate` returned."""
    scores: dict[str, dict[str, HarnessScore]] = {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith(_STDERR) or not isinstance(value, Real):
                continue
            stderr = metrics.get(f"{metric}{_STDERR},{name}")
            stderr = float(stderr) if isinstance(stderr, Real) else None
            scores.setdefault(task, {})[key] = HarnessScore(value=float(value), stderr=stderr)
    return HarnessResult(
        scores=scores,
        versions=_json_ready(found["versions"]),
        n_samples=_json_ready(found["n-samples"]),
        configs=_json_ready(found["configs"]),
        samples=_json_ready(found.get("samples", {})),
        harness_version=version("lm_eval"),
    )


def _json_ready(value: Any) -> Any:
    """The same in what JSON has; what it has not is written as text, and numbers that are not finite as None."""
    if isinstance(value, dict):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_json_ready(item) for item in value]
    if hasattr(value, "tolist"):
        return _json_ready(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return getattr(value, "__qualname__", None) or str(value)
