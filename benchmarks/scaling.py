"""How the cost of a training step grows with the number of experts, the rank, the tokens and the layers.

One axis is varied at a time. Every point of an axis has two anchors: the same method at the first point of the axis
(how it grows) and the base model of the same size (what it costs there). Measured are the seconds of a training step,
interleaved over all points of the axis, and the bytes saved for the backward pass.

experts   6 and 24 (four of each)
rank      1, 4 and 16 times --rank; the parallel adapter is always twice as wide
tokens    a quarter of --tokens per row, --tokens, and twice as many
layers    a third of --layers, --layers, and twice as many
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.base import BENCHMARKS, Benchmark, Options, Track, silent
from benchmarks.contenders import build, settings_of
from benchmarks.models import base_model, make_batch
from benchmarks.rows import BASE, Row, rows_of
from benchmarks.saved_bytes import contender_footprint
from benchmarks.timing import interleave
from benchmarks.training_step import timed_step


@dataclass(frozen=True)
class Point:
    """One contender at one place of an axis.

    Attributes:
        label: as in the rows: ``soft[rank=8]``.
        contender: key of `CONTENDERS`.
        options: those of this place.
        anchors: labels of the points it is compared with.
    """

    label: str
    contender: str
    options: Options
    anchors: tuple[str, ...]


def points(axis: str, options: Options, methods: tuple[str, ...]) -> list[Point]:
    """The points of an axis, anchors first.

    Args:
        axis: one of `AXES`.
        options: the values of everything that is not varied.
        methods: contenders besides the base model.
    """
    mixtures = [method for method in methods if method.startswith(("soft", "sparse"))]
    if axis == "experts":
        # The copies are part of the contender, the options do not change.
        made = [Point(BASE, BASE, options, (BASE,))]
        for method in mixtures:
            first = f"{method}[experts=6]"
            made += [Point(first, method, options, (first, BASE))]
            made += [Point(f"{method}[experts=24]", f"{method}_24", options, (first, BASE))]
        return made
    made = [] if axis != "rank" else [Point(BASE, BASE, options, (BASE,))]
    for method in methods if axis == "rank" else (BASE, *methods):
        first = ""
        for value, at in _values(axis, options):
            label = f"{method}[{axis}={value}]"
            first = first or label
            base = BASE if axis == "rank" else f"{BASE}[{axis}={value}]"
            made.append(Point(label, method, at, (first, base) if method != BASE else (first,)))
    return made


def _values(axis: str, options: Options) -> Iterator[tuple[int, Options]]:
    if axis == "rank":
        for rank in (options.rank, 4 * options.rank, 16 * options.rank):
            yield rank, options.changed(rank=rank)
    elif axis == "tokens":
        for tokens in sorted({max(1, options.tokens // 4), options.tokens, 2 * options.tokens}):
            yield tokens, options.changed(tokens=tokens)
    else:
        for layers in sorted({max(1, options.sizes.layers // 3), options.sizes.layers, 2 * options.sizes.layers}):
            yield layers, options.changed(sizes=replace(options.sizes, layers=layers))


@BENCHMARKS.register("scaling")
class Scaling(Benchmark):
    """See the module's docstring."""

    summary = "step seconds and saved bytes over experts, rank, tokens, layers"
    methods = (BASE, "soft", "sparse")
    allowed = (BASE, "lora", "soft", "sparse")
    repeats = 7

    def run(self, options: Options, track: Track = silent) -> list[Row]:
        rows = []
        for axis in options.axes:
            rows += self._along(axis, options, track)
        return rows

    def _along(self, axis: str, options: Options, track: Track) -> list[Row]:
        wanted = points(axis, options, self.contenders(options)[1:])
        bases: dict[int, Any] = {}
        tasks, saved = {}, {}
        for point in wanted:
            layers = point.options.sizes.layers
            if layers not in bases:
                bases[layers] = base_model(point.options)
            saved[point.label] = [float(contender_footprint(point.contender, bases[layers], point.options).saved)]
            model = build(point.contender, bases[layers], point.options, train=True)
            tasks[point.label] = timed_step(model, make_batch(point.options), point.options)
        seconds = interleave(
            tasks,
            repeats=self.rounds(options),
            warmup=options.warmup,
            track=track,
            description=f"scaling, {axis}",
        )
        common: dict[str, Any] = {
            "benchmark": "scaling",
            "model": options.model_name,
            "settings": {point.label: settings_of(point.contender, point.options, axis=axis) for point in wanted},
            "against": {point.label: point.anchors for point in wanted},
        }
        rows = rows_of(seconds, metric="step_seconds", unit="s", **common)
        return rows + rows_of(saved, metric="saved_bytes", unit="B", **common)
