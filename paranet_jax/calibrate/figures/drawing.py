"""What the figures of a calibrated run have in common: titles, cost axes, numbered marks, rows of numbers."""

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paranet_jax.calibrate.figures.figure_types import FigureData
from paranet_jax.report.plots import ORANGE

CHOSEN = {'linestyle': '', 'marker': '*', 'markersize': 20, 'color': ORANGE, 'markeredgecolor': 'black', 'zorder': 3}


class Drawing(NamedTuple):
  """A figure and its numbers.

  Attributes:
    figure: the picture.
    rows: the numbers, all with the same keys, which name the unit; a number may be None or NaN: there is none.
    facts: what holds for all rows.
  """

  figure: Figure
  rows: list[dict[str, Any]]
  facts: dict[str, Any] = {}


def new_figure(data: FigureData, what: str, width: float, height: float) -> Figure:
  """An empty figure (inches) with a title that is wrapped to its width."""
  figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
  figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.03)
  figure.suptitle(wrapped_title(data, what, width), parse_math=False)
  return figure


def wrapped_title(data: FigureData, what: str, width: float) -> str:
  """The run, the data set and what is shown, in lines that fit `width` inches of 12 point letters."""
  name = textwrap.fill(f'{data.run} on {data.dataset}', int(9 * width))
  return f'{name}\n{what}'


def split_label(data: FigureData, split: str) -> str:
  """Such as `held out (5,000 images)`."""
  return f'{split.replace("_", " ")} ({data.images[split]:,} images)'


def cost_scale(unit: str, costs: np.ndarray) -> tuple[float, str]:
  """What to divide costs by, and the unit they are then in."""
  if unit == 'ms':
    return 1.0, 'ms an image'
  for least, size, letter in ((1e10, 1e9, 'G'), (1e5, 1e6, 'M')):
    if np.max(costs) >= least:
      return size, f'{letter} multiply-adds an image'
  return 1e3, 'k multiply-adds an image'


def numbered_marks(axes: Axes, x: np.ndarray, y: np.ndarray, numbers: Sequence[int], **style: Any) -> None:
  """Discs with the exits' numbers in them, joined if `style` has a linestyle."""
  axes.plot(x, y, **{'linestyle': '', 'marker': 'o', 'markersize': 11, 'markeredgecolor': 'white', 'zorder': 4} | style)
  for number, *place in zip(numbers, x, y, strict=True):
    axes.annotate(
      str(number), place, color='white', fontsize=7, fontweight='bold', ha='center', va='center_baseline', zorder=5
    )
