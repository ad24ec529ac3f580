"""The figures of a report: SVG inside the page, in its colors, readable at the width of a phone."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from paranet_jax.calibrate.figures.drawings import cost_scale
from paranet_jax.calibrate.figures.figure_data import FigureData
from paranet_jax.display.curves import draw_panels
from paranet_jax.display.plots import GREEN, ORANGE, VERMILLION, bare, exit_color, logarithmic, own_style

_WIDTH, _HEIGHT = 4.6, 3.5  # Inches; on a phone, letters are then nearly as large as the text.
_INK, _GRID = '#010203', '#040506'
"""Stand-ins for the page's colors, which differ at night."""
_PAGE_COLORS = {
  **{_INK: 'currentColor', '#000000': 'currentColor', _GRID: 'var(--grid)'},
  **{'#ffffff': 'var(--raised)', '#4d4d4d': 'var(--soft)', '#808080': 'var(--soft)'},
}
_COST_RATIO = 20  # An axis that spans a larger ratio is logarithmic.
_MIN_IMAGES = 10  # The accuracy of a bin with fewer is noise.


class Point(NamedTuple):
  """A budget: its place in the picture, and what it gives.

  Attributes:
    x, y: in the units of the SVG.
    cost: mean multiply-adds an image.
    accuracy: a fraction.
  """

  x: float
  y: float
  cost: float
  accuracy: float


def curves_chart(workdir: Path) -> str:
  """Loss and accuracy of each exit by epoch."""
  figure = _figure(2.1 * _HEIGHT)
  draw_panels(figure, figure.subplots(2, 1), workdir, columns=3)
  return _svg(figure)


def budget_chart(data: FigureData) -> tuple[str, list[Point]]:
  """Accuracy of the test images against their mean cost, and the points that a slider visits, cheapest first."""
  figure = _figure(_HEIGHT)
  axes = figure.subplots()
  factor, words = cost_scale('macs', data.alone)
  curve = data.families['patience' if 'patience' in data.families else 'optimal']['test']
  order = np.argsort(curve.cost, kind='stable')
  cost, accuracy = curve.cost[order], curve.accuracy[order]
  oracle = data.families['oracle']['test']
  axes.plot(oracle.cost / factor, 100 * oracle.accuracy, ':', color=_INK, label='oracle, out of reach')
  axes.plot(cost / factor, 100 * accuracy, color=VERMILLION, label='thresholds')
  axes.plot(data.alone / factor, 100 * data.accuracy['test'], 'o', color=GREEN, label='one exit for all')
  chosen = data.chosen['test']
  axes.plot(chosen.cost / factor, 100 * chosen.accuracy, '*', markersize=15, color=ORANGE, label='as calibrated')
  axes.set(xlabel=f'mean cost ({words})', ylabel=data.axis)
  bare(axes)
  if data.alone.max() > _COST_RATIO * data.alone.min():
    logarithmic(axes.xaxis)
  _legend(figure, axes, 2)
  chart = _svg(figure)  # Which lays out the axes.
  pixels = axes.transData.transform(np.stack([cost / factor, 100 * accuracy], axis=1))
  height = 72 * figure.get_figheight()
  points = [
    Point(x, height - y, *pair)
    for (x, y), *pair in zip((pixels * 72 / figure.dpi).tolist(), cost.tolist(), accuracy.tolist(), strict=True)
  ]
  return chart, points


def reliability_chart(data: FigureData) -> str:
  """The accuracy of each exit on all test images by its calibrated probability."""
  figure = _figure(_HEIGHT)
  axes = figure.subplots()
  axes.plot((0, 100), (0, 100), color=_GRID, linewidth=2, label='perfectly calibrated')
  for number, exit_ in zip(data.exits.tolist(), data.reliability, strict=True):
    bins = exit_.after
    filled = bins.counts >= _MIN_IMAGES
    label = f'exit {number}, ECE {100 * bins.ece:.1f} %'
    x, y = 100 * bins.confidence[filled], 100 * bins.accuracy[filled]
    axes.plot(x, y, '.-', color=exit_color(number), label=label)
  axes.set(xlabel='probability (%)', ylabel=data.axis, xlim=(0, 100), ylim=(0, 100))
  bare(axes)
  _legend(figure, axes, 2)
  return _svg(figure)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False, fontsize=9)


def _figure(height: float) -> Figure:
  return Figure(figsize=(_WIDTH, height), dpi=72, layout=ConstrainedLayoutEngine(h_pad=0.06))


def in_page_style(draw: Callable[..., Any]) -> Callable[..., Any]:
  """Draws with text as text and the colors of the page."""

  def drawn(*arguments: Any) -> Any:
    with own_style():
      colors = ('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color')
      matplotlib.rcParams.update(dict.fromkeys(colors, _INK))
      matplotlib.rcParams.update({'axes.facecolor': 'none', 'figure.facecolor': 'none', 'svg.fonttype': 'none'})
      return draw(*arguments)

  return drawn


def _svg(figure: Figure) -> str:
  for axes in figure.axes:
    axes.grid(color=_GRID)
  content = io.StringIO()
  figure.savefig(content, format='svg', metadata={'Date': None})
  text = content.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  for side in ('width', 'height'):  # The page decides; viewBox has the proportions.
    text = re.sub(rf'(<svg [^>]*?) {side}="[^"]*"', r'\1', text, count=1)
  for color, own in _PAGE_COLORS.items():
    text = text.replace(color, own)
  return text
