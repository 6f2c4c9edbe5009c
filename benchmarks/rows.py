"""One measured number with its anchor, and how ratios are made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a result file.

    Attributes:
        benchmark: name in the registry.
        model: family and sizes.
        method: contender.
        metric: what was measured.
        unit: of `value`.
        value: the number; for times the median over rounds.
        baseline: contender that `ratio` divides by.
        ratio: value over the baseline's; for times the median of the ratios of each round.
        ratio_q1: lower quartile of these ratios; None where nothing varies.
        ratio_q3: upper quartile.
        rounds: number of rounds; 0 where nothing varies.
        settings: what the number depends on besides model and method; its rank is that of the contender, and left out
            where the contender has none.
    """

    benchmark: str
    model: str
    method: str
    metric: str
    unit: str
    value: float
    baseline: str
    ratio: float
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    rounds: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def baselines(method: str, present: Sequence[str]) -> list[str]:
    """What a contender is compared with, as far as it is present.

    The base model; for a mixture PEFT LoRA; for a sparse one its soft twin; for one of many experts the one of few.
    """
    wanted = [BASE]
    if method.startswith(("soft", "sparse")):
        wanted.append("lora")
    if method.startswith("sparse"):
        wanted.append(method.replace("sparse", "soft", 1))
    if method.endswith("_24"):
        wanted.append(method.removesuffix("_24"))
    return [name for name in wanted if name in present]


def median_ratio(values: Sequence[float], anchor: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Median and quartiles of the ratios of paired measurements.

    The pairs were measured in the same round, so a machine that slows down for a while slows both.
    """
    ratios = [value / other for value, other in zip(values, anchor, strict=True)]
    if len(ratios) < 2:
        return ratios[0], None, None
    first, middle, third = quantiles(ratios, n=4, method="inclusive")
    return middle, first, third


def rows_of(
    measured: Mapping[str, Sequence[float]],
    *,
    benchmark: str,
    model: str,
    metric: str,
    unit: str,
    settings: Mapping[str, dict[str, Any]],
    against: Mapping[str, Sequence[str]] | None = None,
) -> list[Row]:
    """Rows of one metric.

    Args:
        measured: contender to its number in each round, or to one number where nothing varies.
        benchmark: name in the registry.
        model: family and sizes.
        metric: what was measured.
        unit: of the numbers.
        settings: contender to what its numbers depend on.
        against: contender to its baselines, instead of `baselines`.
    """
    made = []
    for method, values in measured.items():
        for name in baselines(method, list(measured)) if against is None else against[method]:
            ratio, low, high = median_ratio(values, measured[name])
            made.append(
                Row(
                    benchmark=benchmark,
                    model=model,
                    method=method,
                    metric=metric,
                    unit=unit,
                    value=median(values),
                    baseline=name,
                    ratio=ratio,
                    ratio_q1=low,
                    ratio_q3=high,
                    rounds=len(values) if len(values) > 1 else 0,
                    settings=settings[method],
                )
            )
    return made
