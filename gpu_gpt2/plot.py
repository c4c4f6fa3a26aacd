"""Draws the curves of training runs: loss, learning rate, gradient norm and speed by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.training.history import FloatArray, History, read_history, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FILE: Final = "plot.png"  # in the folder of the first run, if no other file is named
SUFFIXES: Final = (".png", ".svg")
# Okabe and Ito's colours, which colour-blind people can distinguish, except their yellow, which is
# too light for a line on white. More than seven runs repeat the colours with the next line style.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES: Final = ("-", "--", ":", "-.")
FAINT: Final = 0.25  # opacity of the curve of single steps, behind the moving average
FAINT_OF_SEVERAL: Final = 0.13  # the same opacity in a plot of several runs, which overlap
AVERAGED: Final = 0.01  # window of the moving average, as a share of the steps of the longest run
FEWEST_AVERAGED: Final = 4  # shortest window of the moving average, in steps
# The losses in the first 5 % of a long run do not set the upper limit of the loss axis. They are so
# much higher than the others that the rest of the curve would look flat.
CROPPED: Final = 0.05
CROPPED_FROM: Final = 200  # steps: shorter runs are shown in full
BEYOND: Final = 0.002  # share of a long run's single steps that may lie below the axis
DECADES: Final = 1.5  # gradient norms that span more powers of ten have a logarithmic axis
INK: Final = "#333333"  # text and axes
INCHES: Final = (11.0, 7.0)
DPI: Final = 150  # a PNG has this many pixels per inch: sharp on a screen and in print


def plot_runs(run_dirs: Sequence[Path], out: Path) -> None:
    """Draws the runs into one PNG or SVG file, by the suffix of `out`.

    Raises ConfigError for another suffix, and DataError if a log cannot be read or the file cannot
    be written.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"cannot draw {out}: the name must end in {' or '.join(SUFFIXES)}")
    histories = {name: read_history(path) for name, path in _names(run_dirs).items()}
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
        "ytick.color": INK, "axes.titlesize": 11, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.axisbelow": True,
        "font.size": 10, "legend.edgecolor": "none", "legend.framealpha": 0.9,
        "legend.fontsize": 9, "legend.title_fontsize": 10,
        "svg.hashsalt": "gpu-gpt2",  # makes the SVG of the same runs the same file
    }  # fmt: skip
    with mpl.rc_context({**mpl.rcParamsDefault, **style, "backend": "agg"}):
        figure = Figure(figsize=INCHES, layout="constrained")
        _draw(figure, histories)
        temporary = out.with_name(f".{out.stem}.tmp{out.suffix}")
        try:
            figure.savefig(temporary, dpi=DPI)
            temporary.replace(out)  # a viewer never reads an incomplete file
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"cannot write {out}: {error.strerror}") from error


def _names(run_dirs: Sequence[Path]) -> dict[str, Path]:
    """Returns the run folders by their names, or by whole paths where two names are equal."""
    short = [path.resolve().name for path in run_dirs]
    return {
        name if short.count(name) == 1 else str(path): path
        for name, path in zip(short, run_dirs, strict=True)
    }


def _draw(figure: Any, histories: dict[str, History]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    (loss, lr), (norm, speed) = figure.subplots(2, 2)
    longest = max(len(history.steps) for history in histories.values())
    window = max(FEWEST_AVERAGED, AVERAGED * longest)
    faint = FAINT if len(histories) == 1 else FAINT_OF_SEVERAL
    for index, (name, history) in enumerate(histories.items()):
        line = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)],
            "label": name,
        }
        _draw_smoothed(loss, history.steps, history.loss, window, line, faint)
        _draw_validations(loss, history, line)
        lr.plot(history.steps, history.lr, linewidth=1.6, **line)
        _draw_smoothed(norm, history.steps, history.grad_norm, window, line, faint)
        _draw_smoothed(speed, history.steps, history.tokens_per_s, window, line, faint)
    _finish_loss(loss, histories, window)
    _finish_norm(norm, histories)
    lr.set_title("Learning rate")
    lr.set_ylim(bottom=0)
    lr.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    speed.set_title("Speed")
    speed.set_ylabel("tokens per second")
    # A single slow or fast step, such as the first, does not set the scale.
    fastest = max(np.nanquantile(h.tokens_per_s, 0.99) for h in histories.values())
    speed.set_ylim(0, 1.15 * fastest)
    last = max(int(history.steps[-1]) for history in histories.values())
    for axes in (loss, lr, norm, speed):
        axes.set_xlim(0, last * 1.02)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    speed.yaxis.set_major_formatter(EngFormatter(sep=" "))
    for axes in (norm, speed):
        axes.set_xlabel("step")


def _draw_smoothed(
    axes: Axes, steps: Any, values: FloatArray, window: float, line: dict[str, Any], faint: float
) -> None:
    """Draws the values of single steps faintly, and their moving average strongly."""
    few = len(steps) < 2 * FEWEST_AVERAGED
    axes.plot(
        steps, values, alpha=faint, linewidth=0.8, color=line["color"], marker="." if few else ""
    )
    axes.plot(steps, smoothed(values, window), linewidth=1.8, **line)


def _draw_validations(axes: Axes, history: History, line: dict[str, Any]) -> None:
    many = len(history.val_steps) > 40
    axes.plot(
        history.val_steps,
        history.val_loss,
        linestyle="none",
        marker="o",
        markersize=3 if many else 5.5,
        markerfacecolor="white",
        markeredgecolor=line["color"],
        markeredgewidth=1 if many else 1.5,
        zorder=3,
    )


def _finish_loss(axes: Axes, histories: dict[str, History], window: float) -> None:
    from matplotlib.lines import Line2D

    axes.set_title("Loss")
    axes.set_ylabel("loss (nats per token)")
    shown = []
    for history in histories.values():
        n = len(history.loss)
        cropped = int(CROPPED * n) if n >= CROPPED_FROM else 0
        single = history.loss[cropped:]
        if cropped:
            single = np.nanquantile(single, [BEYOND])
        validations = history.val_loss[history.val_steps >= history.steps[cropped]]
        shown += [smoothed(history.loss, window)[cropped:], single, validations]
    values = np.concatenate(shown)
    low, high = np.nanmin(values), np.nanmax(values)
    margin = 0.06 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    alone = len(histories) == 1
    handles, _ = axes.get_legend_handles_labels()
    colour = COLOURS[0] if alone else INK
    if alone:
        handles[0].set_label("training, moving average")
        handles.insert(0, Line2D([], [], color=colour, alpha=FAINT, label="training, single steps"))
    if any(len(history.val_steps) for history in histories.values()):
        circle: dict[str, Any] = {
            "marker": "o", "markerfacecolor": "white", "markeredgewidth": 1.5, "linestyle": "none",
        }  # fmt: skip
        handles.append(Line2D([], [], color=colour, label="validation", **circle))
    title = next(iter(histories)) if alone else None
    axes.legend(handles=handles, loc="upper right", title=title, alignment="left")


def _finish_norm(axes: Axes, histories: dict[str, History]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_title("Gradient norm")
    axes.set_ylabel("norm before clipping")
    norms = np.concatenate([history.grad_norm for history in histories.values()])
    norms = norms[np.isfinite(norms) & (norms > 0)]
    if norms.size and norms.max() / norms.min() > 10**DECADES:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    elif norms.size:
        axes.set_ylim(0, 1.1 * norms.max())
    marked = False
    for index, history in enumerate(histories.values()):
        if not history.skipped.any():
            continue
        steps, values = history.steps[history.skipped], history.grad_norm[history.skipped]
        # A step whose norm is not finite is marked on the lower edge.
        edge = axes.get_ylim()[0]
        axes.plot(
            steps,
            np.where(np.isfinite(values), values, edge),
            linestyle="none",
            marker="x",
            color=COLOURS[index % len(COLOURS)],
            label="" if marked else "no update",
            clip_on=False,
        )
        axes.set_ylim(bottom=edge)
        marked = True
    if marked:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[-1:], labels[-1:], loc="upper right")
