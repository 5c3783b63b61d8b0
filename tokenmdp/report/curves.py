"""Learning curves as a PNG: mean over seeds, a band for their spread."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from tokenmdp.report.colours import COLOURS
from tokenmdp.report.drawing import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = Mapping[str, Any]

SMOOTHING = 1 / 10  # share of a run's updates that each point of a smoothed curve averages

LABELS = {
    "score_mean": "mean score of the reward model",
    "gold_mean": "mean score of the judge",
    "kl": "KL to the reference, nats per sequence",
    "entropy": "entropy, nats per token",
    "explained_variance": "explained variance of the returns",
    "accuracy": "share of pairs in the right order",
    "score_gap": "score of chosen less rejected, log-odds",
    "chosen_logratio": "log-ratio of the chosen response, nats",
    "rejected_logratio": "log-ratio of the rejected response, nats",
}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, one per line; a last line cut short by a crash is left out.

    Raises:
        ValueError: a line other than the last is not a JSON object, so the file is not ours.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a {type(record).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path} line {number} is not a metrics record ({error}); move the file away or choose another run"
            ) from error
        records.append(record)
    return records


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average over ``window`` values; towards the ends it narrows, so that it stays centred.

    >>> smooth([0.0, 3.0, 6.0, 12.0], window=3).tolist()
    [0.0, 3.0, 7.0, 12.0]
    """
    if window < 1:
        raise ValueError(f"window is {window}; it counts updates and must be at least 1")
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, places[::-1]), window // 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[places + reach + 1] - total[places - reach]) / (2 * reach + 1)


def band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over runs and half the width of its 95% t interval; runs (R, K) -> (K,), (K,). One run: width 0.

    >>> mean, half = band(np.array([[0.0, 1.0], [2.0, 1.0]]))
    >>> mean.tolist(), [round(float(width), 2) for width in half]
    ([1.0, 1.0], [12.71, 0.0])
    """
    runs = curves.shape[0]
    mean = curves.mean(0)
    if runs == 1:
        return mean, np.zeros_like(mean)
    return mean, stats.t.ppf(0.975, runs - 1) * curves.std(0, ddof=1) / np.sqrt(runs)


def plot_learning_curves(
    runs: Mapping[str, Sequence[Sequence[Metrics]]],
    path: str | Path,
    metric: str | Sequence[str] = "score_mean",
    *,
    window: int | None = 1,
    title: str = "",
) -> Path:
    """Draw ``metric`` against updates, one colour per label, and write a PNG.

    Args:
        runs: label -> one list of metric records per seed, as ``PPO.history`` and `read_metrics` give them.
        path: the PNG to write; its folder is created.
        metric: a key of the records, or several: one panel each, below one another.
        window: updates in the moving average of the thick line; above 1 a single run is shown unsmoothed behind it.
            None: a tenth of each run's updates, and one.
        title: heading of the figure.

    Seeds of one label are cut to the shortest; the band is the 95% t interval of their mean.

    Raises:
        ValueError: nothing to draw, or a record without ``metric``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it would look for a display and keep state
    from matplotlib.figure import Figure

    metrics = [metric] if isinstance(metric, str) else list(metric)
    figure = Figure(figsize=(8, 1.2 + 3.1 * len(metrics)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    for axes, key in zip(panels, metrics, strict=True):
        draw_metric(axes, runs, key, window)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("update")
    if len(runs) > 1:
        several = any(len(seeds) > 1 for seeds in runs.values())
        panels[0].legend(frameon=False, title="band: 95% interval of the mean" if several else None)
    if title:
        figure.suptitle(title)
    return write_png(figure, path)


def draw_metric(
    axes: Axes, runs: Mapping[str, Sequence[Sequence[Metrics]]], key: str, window: int | None = None
) -> None:
    """One panel of `plot_learning_curves`; the window None is `SMOOTHING` of each run's updates."""
    for place, (label, seeds) in enumerate(runs.items()):
        colour = COLOURS[place % len(COLOURS)]
        updates, curves = _curves(label, seeds, key)
        width = 1 + int(SMOOTHING * len(updates)) if window is None else window
        mean, half = band(np.stack([smooth(curve, width) for curve in curves]))
        if len(curves) == 1 and width > 1:
            axes.plot(updates, curves[0], color=colour, linewidth=0.8, alpha=0.4)
        else:
            axes.fill_between(updates, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
        name = label if len(curves) == 1 else f"{label} ({len(curves)} seeds)"
        axes.plot(updates, mean, color=colour, linewidth=2, label=name)
    axes.set_ylabel(LABELS.get(key, key))
    if key == "explained_variance":  # one early update can be far below
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -1), top=1)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]


def _curves(label: str, seeds: Sequence[Sequence[Metrics]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Updates (K,) and the metric of every seed (R, K), cut to the shortest seed."""
    length = min((len(records) for records in seeds), default=0)
    if length == 0:
        raise ValueError(f"{label!r} has a run without a single record: nothing to draw")
    for records in seeds:
        missing = next((record for record in records if key not in record), None)
        if missing is not None:
            raise ValueError(f"{label!r} has a record without {key!r}; it holds {', '.join(sorted(missing))}")
    updates = np.array([record.get("update", place + 1) for place, record in enumerate(seeds[0][:length])])
    return updates, np.array([[record[key] for record in records[:length]] for records in seeds], dtype=float)
