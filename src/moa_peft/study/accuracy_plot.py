"""Accuracy over trainable parameters, one panel for each data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moa_peft.errors import UserError
from moa_peft.study.drawing import check_format, import_matplotlib, save_figure
from moa_peft.study.records import RunRecord, averaged_tasks
from moa_peft.study.statistics import MeanSpread, macro_average, mean_and_spread

# Colours by Okabe and Ito, dark ones only, so that they stay apart in grey together with the shapes.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9")
_SHAPES = ("o", "s", "^", "D", "v", "P", "X", "p")
_PANEL_INCHES = (5.6, 4.2)
_PANELS_IN_A_ROW = 2
_LABEL_POINTS = 8.0
_APART = 0.02  # of the length of the axis


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A row: its parameters (0: a line), where on the axis it is drawn, and its accuracy in percent."""

    row: str
    parameters: int
    x: float
    accuracy: MeanSpread


def plot_accuracy_over_parameters(records: Sequence[RunRecord], path: Path, *, measures: Mapping[str, str]) -> None:
    """Draw mean accuracy over trainable parameters, with the standard deviation over seeds as bars.

    Every row is a point with its name beside it; the axis of parameters is logarithmic. Rows of (nearly) equal numbers
    of parameters are drawn side by side. A row without trainable parameters is a dashed line. Accuracy is the average
    over tasks in percent (see `averaged_tasks`). The same records give the same bytes.

    Args:
        records: the finished runs; those not scored on a set that the average covers are left out.
        path: the file to write, ending in ``.png`` or ``.svg``.
        measures: for every data set to draw an accuracy, as in `ItemScores.measure`.

    Raises:
        UserError: matplotlib is missing, the ending is another one, or no run was scored by these measures.
    """
    matplotlib = import_matplotlib()
    check_format(path)
    panels = {data: _points(records, data=data, measure=measure) for data, measure in measures.items()}
    panels = {data: points for data, points in panels.items() if points}
    if not panels:
        raise UserError(
            f"measures are {dict(measures)!r}, but no run was scored by them on a question set that the average "
            "covers; give some that the records hold."
        )
    columns = min(_PANELS_IN_A_ROW, len(panels))
    lines = -(-len(panels) // columns)
    figure = matplotlib.figure.Figure(
        figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines), dpi=150, layout="constrained"
    )
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    styles = {row: number for number, row in enumerate(dict.fromkeys(record.row for record in records))}
    for panel, (data, points) in zip(axes, panels.items(), strict=False):
        _draw(panel, points, styles=styles)
        moved = any(point.x != point.parameters for point in points)
        panel.set(
            title=data,
            xlabel="trainable parameters" + (" (equal ones side by side)" if moved else ""),
            ylabel=f"{measures[data].replace('_', ' ')} (%)",
        )
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    # Fixes where the axes lie, which the places of the labels depend on.
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure).draw()
    figure.set_layout_engine("none")
    for panel, points in zip(axes, panels.values(), strict=False):
        _label(panel, points)
    save_figure(figure, path)


def _points(records: Sequence[RunRecord], *, data: str, measure: str) -> list[_Point]:
    scored = [run for run in records if run.data == data and any(s.measure == measure for s in run.scores)]
    tasks = averaged_tasks(scored, measure=measure)
    if not tasks:
        return []
    points = []
    for row in dict.fromkeys(run.row for run in scored):
        runs = [run for run in scored if run.row == row]
        shares = [100 * macro_average(run, measure=measure, tasks=tasks) for run in runs]
        parameters = max(run.trainable_parameters for run in runs)
        points.append(_Point(row=row, parameters=parameters, x=parameters, accuracy=mean_and_spread(shares)))
    return _side_by_side(points)


def _side_by_side(points: Sequence[_Point]) -> list[_Point]:
    """Move points apart that would cover each other, by a few percent of the axis around their common middle."""
    low, high = _limits(points)
    step = _APART * math.log(high / low)
    groups: list[list[_Point]] = []
    for point in sorted((point for point in points if point.parameters), key=lambda point: point.parameters):
        if groups and math.log(point.parameters / groups[-1][-1].parameters) < step:
            groups[-1].append(point)
        else:
            groups.append([point])
    moved = [point for point in points if not point.parameters]
    for group in groups:
        middle = math.exp(sum(math.log(point.parameters) for point in group) / len(group))
        for place, point in enumerate(group):
            shift = math.exp(step * (place - (len(group) - 1) / 2))
            moved.append(replace(point, x=middle * shift) if len(group) > 1 else point)
    return moved


def _limits(points: Sequence[_Point]) -> tuple[float, float]:
    """Ends of the logarithmic axis: room for names, and wide enough to hold a tick of 1, 2 or 5."""
    numbers = [point.parameters for point in points if point.parameters] or [1]
    room = 1.7 * (max(numbers) / min(numbers)) ** 0.15
    return min(numbers) / room, max(numbers) * room


def _draw(panel: Any, points: Sequence[_Point], *, styles: dict[str, int]) -> None:
    ticker = import_matplotlib().ticker
    panel.set_xscale("log")
    panel.set_xlim(*_limits(points))
    panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    panel.grid(visible=True, color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(y=0.15)
    for point in points:
        number = styles[point.row]
        colour = _COLOURS[number % len(_COLOURS)]
        if point.parameters == 0:
            panel.axhline(point.accuracy.mean, color="0.35", linewidth=1, linestyle="--")
            continue
        panel.errorbar(
            point.x,
            point.accuracy.mean,
            yerr=point.accuracy.deviation,
            color=colour,
            marker=_SHAPES[number % len(_SHAPES)],
            markersize=6,
            markerfacecolor=colour if number % 2 == 0 else "white",
            markeredgewidth=1.3,
            elinewidth=1.1,
            capsize=3,
        )


def _label(panel: Any, points: Sequence[_Point]) -> None:
    """Write every row's name at the nearest free place, with a thin line to its point where that is not beside it."""
    matplotlib = import_matplotlib()
    renderer = panel.figure.canvas.get_renderer()
    frame = panel.get_window_extent(renderer)
    pixels = panel.figure.dpi / 72
    taken = [_extent(panel, point, pad=5 * pixels) for point in points if point.parameters > 0]
    for point in sorted(points, key=lambda point: -point.accuracy.mean):
        is_line = point.parameters == 0
        anchor = (
            (frame.x0 + 4 * pixels, panel.transData.transform((1, point.accuracy.mean))[1])
            if is_line
            else panel.transData.transform((point.x, point.accuracy.mean))
        )
        text = panel.text(0, 0, point.row, fontsize=_LABEL_POINTS, color="0.15", va="center")
        text.set_transform(matplotlib.transforms.IdentityTransform())
        size = text.get_window_extent(renderer)
        place = _free_place(anchor, size.width, size.height, taken, frame, pixels, only_right=is_line)
        taken.append(place)
        text.set_transform(panel.transData)
        text.set_position(panel.transData.inverted().transform((place.x0, (place.y0 + place.y1) / 2)))
        near = matplotlib.transforms.Bbox([anchor, anchor]).padded(9 * pixels)
        if not is_line and not near.overlaps(place):
            end = (min(max(anchor[0], place.x0), place.x1), min(max(anchor[1], place.y0), place.y1))
            ends = panel.transData.inverted().transform([anchor, end])
            panel.plot(*ends.T, color="0.6", linewidth=0.6, zorder=1, scalex=False, scaley=False)


def _extent(panel: Any, point: _Point, *, pad: float) -> Any:
    """The box of a point with its bars, in pixels."""
    matplotlib = import_matplotlib()
    reach = point.accuracy.deviation or 0.0
    ends = [(point.x, point.accuracy.mean + sign * reach) for sign in (-1, 1)]
    return matplotlib.transforms.Bbox(panel.transData.transform(ends)).padded(pad)


def _free_place(
    anchor: Any, width: float, height: float, taken: Sequence[Any], frame: Any, pixels: float, *, only_right: bool
) -> Any:
    """The box nearest to `anchor` that overlaps nothing and lies inside the panel; beside the point if none does."""
    matplotlib = import_matplotlib()
    x, y = anchor
    first = None
    for ring in range(40):
        distance = (8 + 5 * ring) * pixels
        for turn in range(1 if only_right else 16):
            # To the right first, then upwards and downwards in turn.
            angle = (turn + 1) // 2 * (1 if turn % 2 else -1) * math.pi / 8
            middle_x = x + math.cos(angle) * (distance + width / 2)
            middle_y = y + math.sin(angle) * (distance + height / 2)
            if only_right:
                middle_x, middle_y = x + distance + width / 2, y + height * 0.7
            box = matplotlib.transforms.Bbox.from_bounds(middle_x - width / 2, middle_y - height / 2, width, height)
            first = first or box
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.padded(pixels).overlaps(other) for other in taken):
                return box
    return first
