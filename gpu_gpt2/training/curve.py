"""Draws the loss curve that `gpu-gpt2 train` prints at its end, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from gpu_gpt2.training.history import FloatArray

FEWEST_STEPS: Final = 8  # fewer steps do not make a curve
FEWEST_COLUMNS: Final = 24  # a narrower curve has no room for its labels
SPAN: Final = 0.025  # half-width of the moving average, as a share of the steps of the run
# The losses in the first 5 % of a long run do not set the upper limit of the curve. They are so
# much higher than the others that the rest of the curve would look flat.
CROPPED: Final = 0.05
CROPPED_FROM: Final = 200  # steps: shorter runs are shown in full
BRAILLE: Final = 0x2800  # code point of the braille character without dots
# Bits of the 4 rows x 2 columns of dots in a braille character, from the top down.
DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
MARK: Final = "◆"  # marks a validation loss
PLAIN_MARK: Final = "o"  # marks a validation loss in ASCII
PLAIN_DOT: Final = "."  # draws the curve in ASCII


def curve_text(
    steps: Sequence[int],
    losses: Sequence[float],
    validations: Mapping[int, float],
    *,
    width: int,
    height: int,
    encoding: str,
) -> str:
    """Returns the smoothed training loss over the steps, with labels, as lines of text.

    `validations` are validation losses by step. The curve has `height` lines, and the text at most
    `width` columns. It is drawn in braille characters, or in ASCII if `encoding` lacks them. The
    text is empty if there are fewer than FEWEST_STEPS steps or FEWEST_COLUMNS columns.
    """
    if len(steps) < FEWEST_STEPS or width < FEWEST_COLUMNS:
        return ""
    x = np.array(steps, np.float64)
    y = _centred_average(np.array(losses, np.float64), int(SPAN * len(steps)))
    if not np.isfinite(y).all():
        return ""
    cropped = int(CROPPED * len(y)) if len(y) >= CROPPED_FROM else 0
    marks = {step: loss for step, loss in validations.items() if x[cropped] <= step <= x[-1]}
    shown = [*y[cropped:], *marks.values()]
    top, bottom = max(shown), min(shown)
    if not top > bottom:
        top, bottom = top + 0.5, bottom - 0.5
    labels = [f"{value:.2f}" for value in np.linspace(top, bottom, 3)]
    margin = max(map(len, labels)) + 2
    columns = width - margin

    braille = _encodes(encoding, MARK + "".join(map(chr, (BRAILLE, BRAILLE + 0xFF))))
    rows, cols = (4, 2) if braille else (1, 1)  # dots in one character
    dots = _dots(x, y, columns * cols, height * rows, bottom, top)
    cells = [[_character(dots, r, c, braille) for c in range(columns)] for r in range(height)]
    for step, loss in marks.items():
        r = _row(loss, height, bottom, top)
        c = round((step - x[0]) / (x[-1] - x[0]) * (columns - 1))
        cells[r][c] = MARK if braille else PLAIN_MARK

    beside = dict(zip((0, (height - 1) // 2, height - 1), labels, strict=True))
    if height % 2 == 0:  # no line lies in the middle
        del beside[(height - 1) // 2]
    axis = "│" if _encodes(encoding, "│└─") else "|"
    corner, line = ("└", "─") if axis == "│" else ("+", "-")
    lines = ["training loss (nats per token, smoothed)"]
    if marks:
        lines[0] += f"   {MARK if braille else PLAIN_MARK} validation loss"
    lines += [
        f"{beside.get(r, ''):>{margin - 2}} {axis}{''.join(cells[r])}".rstrip()
        for r in range(height)
    ]
    lines.append(" " * (margin - 1) + corner + line * columns)
    first, last = f"{steps[0]:,}", f"step {steps[-1]:,}"
    lines.append(" " * margin + first + last.rjust(columns - len(first)))
    return "\n".join(text[:width] for text in lines)


def _centred_average(values: FloatArray, span: int) -> FloatArray:
    """Returns the weighted average of each value and up to `span` values on either side.

    A centred average does not lag behind a falling loss, unlike an average of past values.
    """
    weights = np.hanning(2 * span + 3)[1:-1]  # without the zeros at both ends
    totals = np.convolve(np.ones_like(values), weights)
    return (np.convolve(values, weights) / totals)[span : span + len(values)]


def _dots(
    x: FloatArray, y: FloatArray, columns: int, rows: int, bottom: float, top: float
) -> list[set[int]]:
    """Returns the rows through which the curve passes, for each column; row 0 is at the top."""
    heights = np.interp(np.linspace(x[0], x[-1], columns), x, y)
    dots: list[set[int]] = []
    before: int | None = None
    for value in heights:
        row = _row(value, rows, bottom, top)
        # A column's dots begin next to the row of the column before, so the curve has no gaps.
        start = row if before is None or before == row else before + (1 if before < row else -1)
        dots.append(set() if value > top else set(range(min(start, row), max(start, row) + 1)))
        before = row
    return dots


def _row(value: float, rows: int, bottom: float, top: float) -> int:
    return min(max(round((top - value) / (top - bottom) * (rows - 1)), 0), rows - 1)


def _character(dots: list[set[int]], row: int, column: int, braille: bool) -> str:
    if not braille:
        return PLAIN_DOT if row in dots[column] else " "
    bits = sum(
        bit
        for r, pair in enumerate(DOTS)
        for c, bit in enumerate(pair)
        if 4 * row + r in dots[2 * column + c]
    )
    return chr(BRAILLE + bits) if bits else " "


def _encodes(encoding: str, characters: str) -> bool:
    try:
        characters.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
