"""A result as a picture: one group of bars a row, with the range. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from statistics import median

from bench.runner import Result, figures_of

COLUMNS = 3


def can_draw() -> bool:
    """Tell whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(result: Result, path: Path) -> None:
    """Write a PNG with one small chart a row: rows differ too much for one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = figures_of(result)
    if not rows:
        return
    height = math.ceil(len(rows) / COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 1 + 2.6 * height), layout="constrained")
    FigureCanvasAgg(figure)
    charts = list(figure.subplots(height, COLUMNS, squeeze=False).flat)
    for chart in charts:
        chart.set_visible(False)
    for chart, (row, by_peer) in zip(charts, rows.items(), strict=False):
        chart.set_visible(True)
        ended = {p: v for p, v in by_peer.items() if not math.isinf(max(v))}
        middles = [median(values) for values in ended.values()]
        below = [median(values) - min(values) for values in ended.values()]
        above = [max(values) - median(values) for values in ended.values()]
        chart.barh(list(ended), middles, xerr=[below, above], capsize=3)
        chart.invert_yaxis()
        chart.set_title(row, fontsize=9)
        chart.tick_params(labelsize=8)
    figure.suptitle(f"{result['scenario']}: {result['title']} ({result['unit']})", fontsize=10)
    figure.savefig(path, dpi=100)
