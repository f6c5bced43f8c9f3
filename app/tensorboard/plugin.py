"""The page that TensorBoard opens on, as a plugin of it.

TensorBoard's own charts hide what a run is judged by: they smooth, cut off the beginning as an outlier, give all curves
of a run one colour, and know no line but a curve. So the page draws what `layout` asks for by itself (`page.js`); the
tabs of TensorBoard stand beside it, for everything else.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping
from importlib.resources import files
from itertools import takewhile
from typing import Any

from tensorboard import context, plugin_util
from tensorboard.backend import http_util
from tensorboard.data.provider import RunTagFilter
from tensorboard.plugins import base_plugin
from tensorboard.plugins.scalar.metadata import PLUGIN_NAME as SCALARS
from werkzeug import Request, Response

from app.tensorboard.layout import LAYOUT, Chart

POINTS = 500
"""Points of a curve that are drawn at most."""
RISE = 0.02
"""Share by which a held-out loss lies above its best when that is worth a look."""

Curve = list[tuple[int, float, float]]
"""(step, value, seconds since 1970) in the order of steps."""
Run = Mapping[str, Curve]
"""Name -> curve."""


class RunPage(base_plugin.TBPlugin):
    """The page.

    Args:
        context: where the curves come from.
    """

    plugin_name = "superbolt"

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._data: Any = context.data_provider
        self._folder = str(context.logdir or "").rstrip("/").rpartition("/")[2]

    def get_plugin_apps(self) -> dict[str, Any]:
        """Return what is served: the page's script, and its content."""
        return {"/page.js": Request.application(self._script), "/content": Request.application(self._content)}

    def is_active(self) -> bool:
        """Return that there is always something to see."""
        return True

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return how the page is loaded."""
        return base_plugin.FrontendMetadata(es_module_path="/page.js", tab_name="Superbolt")

    def _script(self, request: Request) -> Response:
        script = (files("app.tensorboard") / "page.js").read_bytes()
        return http_util.Respond(request, script, "text/javascript")

    def _content(self, request: Request) -> Response:
        ctx, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        return http_util.Respond(request, content(self._read(ctx, experiment), time.time()), "application/json")

    def _read(self, ctx: context.RequestContext, experiment: str) -> dict[str, Run]:
        found = self._data.list_scalars(ctx, experiment_id=experiment, plugin_name=SCALARS)
        tags = {tag for run in found.values() for tag in run if is_shown(tag)}
        if not tags:
            return {}
        read = self._data.read_scalars(
            ctx,
            experiment_id=experiment,
            plugin_name=SCALARS,
            downsample=POINTS,
            run_tag_filter=RunTagFilter(tags=sorted(tags)),
        )
        return {
            self._folder if run == "." else run: {
                tag: [(point.step, point.value, point.wall_time) for point in points] for tag, points in curves.items()
            }
            for run, curves in read.items()
        }


def is_shown(name: str) -> bool:
    """Return whether a curve is in a chart, or what one is held against."""
    return name.startswith("reference/") or any(
        re.fullmatch(chart.curves, name) for charts in LAYOUT.values() for chart in charts
    )


def content(runs: Mapping[str, Run], now: float) -> dict[str, Any]:
    """Return what the page shows.

    Args:
        runs: the curves of each run.
        now: seconds since 1970.

    Returns:
        `runs`: name, newest step, seconds since it was written, newest value of each headline (None: not measured), and
        `troubles`, lines; `groups`: those that have a chart, each with the charts that have a curve.
    """
    groups = []
    for title, charts in LAYOUT.items():
        drawn = [_drawn(chart, runs) for chart in charts]
        if shown := [chart for chart in drawn if chart["series"]]:
            groups.append({"title": title, "charts": shown})
    return {"runs": [_headline(name, run, now) for name, run in sorted(runs.items()) if run], "groups": groups}


def _drawn(chart: Chart, runs: Mapping[str, Run]) -> dict[str, Any]:
    """Return a chart as the page draws it."""
    series = [
        {"run": name, "curve": curve, "points": [[step, _rounded(value)] for step, value, _ in points]}
        for name, run in sorted(runs.items())
        for curve, points in _measured(chart, run)
    ]
    names = sorted({one["curve"] for one in series})
    shown = dict(zip(names, short_names(names), strict=True)) | chart.names
    for one in series:
        one["curve"] = shown[one["curve"]]
    lines = {
        (what, _rounded(number))
        for what, value in chart.references.items()
        for number in ([value] if not isinstance(value, str) else _newest(runs, value))
    }
    return {
        "title": chart.title,
        "note": chart.note,
        "share": chart.share,
        "axis": list(chart.axis),
        "references": [{"name": what, "value": value} for what, value in sorted(lines)],
        "series": series,
    }


def _measured(chart: Chart, run: Run) -> Iterator[tuple[str, Curve]]:
    return ((name, points) for name, points in sorted(run.items()) if points and re.fullmatch(chart.curves, name))


def _newest(runs: Mapping[str, Run], name: str) -> list[float]:
    return [run[name][-1][1] for run in runs.values() if run.get(name)]


def short_names(names: list[str]) -> list[str]:
    """Return names without the parts (between slashes) that all have in common; one name keeps its last."""
    parts = [name.split("/") for name in names]
    if len(parts) < 2:
        return [part[-1] for part in parts]
    start, end = _shared(parts), _shared([part[::-1] for part in parts])
    return ["/".join(part[start : len(part) - end]) for part in parts]


def _shared(parts: list[list[str]]) -> int:
    """Return how many of the first entries are the same in all."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))


def _headline(name: str, run: Run, now: float) -> dict[str, Any]:
    """Return the line of a run."""
    values = {
        "bits_per_byte": "validation/bits_per_byte",
        "gzip": "reference/gzip_bits_per_byte",
        "validation_loss": "validation/loss",
        "training_loss": "training/next_token_loss",
        "tokens_per_second": "training/tokens_per_second",
    }
    return {
        "name": name,
        "step": max(points[-1][0] for points in run.values() if points),
        "seconds": max(0.0, now - max(points[-1][2] for points in run.values() if points)),
        **{key: _rounded(run[tag][-1][1]) if run.get(tag) else None for key, tag in values.items()},
        "troubles": troubles(run),
    }


def troubles(run: Run) -> list[str]:
    """Return what is worth a look in the newest values of a run, a line each."""
    found = []
    for tag, what in (("training/next_token_loss", "training loss"), ("validation/loss", "held-out loss")):
        if run.get(tag) and not math.isfinite(run[tag][-1][1]):
            found.append(f"{what} is not finite")
    if held_out := [point for point in run.get("validation/loss", []) if math.isfinite(point[1])]:
        best = min(held_out, key=lambda point: point[1])
        if held_out[-1][1] > best[1] * (1 + RISE):
            found.append(f"held-out loss {held_out[-1][1]:.4g} has risen from {best[1]:.4g} at step {best[0]}")
    for chart in (chart for charts in LAYOUT.values() for chart in charts):
        values = [points[-1][1] for _, points in _measured(chart, run)]
        for limit, worst, side in ((chart.above, max, "above"), (chart.below, min, "below")):
            if limit is not None and values and worst([*values, limit]) != limit:
                value = worst(values)
                shown, bound = (f"{v:.3g}" if not chart.share else f"{v:.3g}%" for v in _scaled(value, limit, chart))
                found.append(f"{chart.title[0].lower()}{chart.title[1:]}: {shown}, {side} {bound}")
    return found


def _scaled(value: float, limit: float, chart: Chart) -> tuple[float, float]:
    factor = 100 if chart.share else 1
    return factor * value, factor * limit


def _rounded(value: float) -> float | None:
    """Return a number with six digits, for JSON; None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
