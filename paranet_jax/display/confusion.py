"""The picture of what each exit takes the images of each class for."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from paranet_jax.display.plots import own_style, save_figure
from paranet_jax.display.tables import short_name

FILE_NAME = 'confusion.png'

# Inches: a panel, and the margins that hold the color bar and the titles.
_SIDE, _RIGHT, _TOP = 3.4, 1.0, 0.8
_NAMED = 30  # The names of more classes would touch each other.
_LONGEST_NAME, _LONGEST_TITLE = 16, 60
_MOST_PANELS = 12
_COLUMNS = 4


@own_style()
def draw_confusion(
  workdir: Path,
  matrices: Mapping[int, Int[np.ndarray, 'C C']],
  class_names: Sequence[str],
  name: str,
  dataset: str,
) -> Path:
  """Draws one panel per exit into `workdir/confusion.png` atomically and returns the path of the figure.

  The size does not depend on the number of classes. Of more than 12 exits, 12 are drawn, the last among them.

  Args:
    matrices: test images by class and prediction, for each exit number.
    class_names: one per row.
    name: of the run.
    dataset: its name.
  """
  path = workdir / FILE_NAME
  save_figure(confusion_figure(matrices, class_names, f'{name} on {dataset}'), path)
  return path


def confusion_figure(matrices: Mapping[int, Int[np.ndarray, 'C C']], class_names: Sequence[str], title: str) -> Figure:
  """The shares of each class's images by prediction: a row per class, a column per prediction."""
  drawn = np.linspace(len(matrices) - 1, 0, min(len(matrices), _MOST_PANELS)).round().astype(int)[::-1]
  numbers = [sorted(matrices)[index] for index in drawn]
  columns = min(len(numbers), _COLUMNS)
  rows = math.ceil(len(numbers) / columns)
  labels = [short_name(name, _LONGEST_NAME) for name in class_names] if len(class_names) <= _NAMED else []
  margin = 0.4 + 0.075 * max(map(len, labels), default=3)  # Inches, for the names of the classes.
  # A narrower figure would cut off its title.
  width, height = max(margin + columns * _SIDE + _RIGHT, 6), margin + rows * _SIDE + _TOP
  figure = Figure(figsize=(width, height), dpi=100)
  title = f'{short_name(title, _LONGEST_TITLE)}\ntest images of each class (row) by prediction (column)'
  figure.suptitle(title, parse_math=False, fontsize=11)
  grid = figure.subplots(
    rows,
    columns,
    squeeze=False,
    gridspec_kw={
      **{'left': margin / width, 'right': 1 - _RIGHT / width, 'wspace': 0.08},
      **{'bottom': margin / height, 'top': 1 - _TOP / height, 'hspace': 0.12},
    },
  )
  scale = ScalarMappable(Normalize(0, 100), 'Blues')
  for place, axes in enumerate(grid.flat):
    if place >= len(numbers):
      axes.set_axis_off()
      continue
    counts = matrices[numbers[place]]
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap=scale.cmap, norm=scale.norm, aspect='auto')
    axes.set_title(f'exit {numbers[place]}', fontsize=10)
    _name_classes(axes, labels, below=place + columns >= len(numbers), left=place % columns == 0)
  bar = figure.add_axes((1 - (_RIGHT - 0.15) / width, margin / height, 0.15 / width, 1 - (margin + _TOP) / height))
  figure.colorbar(scale, cax=bar, label='share of the class (%)')
  return figure


def _name_classes(axes: Axes, labels: Sequence[str], below: bool, left: bool) -> None:
  if labels:
    size = 8 if len(labels) <= 15 else 6
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(labels)), labels, fontsize=size, parse_math=False)
  axes.tick_params(labelbottom=below, labelleft=left, length=2)
