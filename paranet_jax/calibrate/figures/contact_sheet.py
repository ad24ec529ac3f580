"""The figure of the easiest and the hardest test images of each exit, with their labels and predictions."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox, TransformedBbox

from paranet_jax.calibrate.figures.drawings import Drawing, wrapped_title
from paranet_jax.calibrate.figures.figure_data import FigureData
from paranet_jax.display.plots import VERMILLION
from paranet_jax.display.tables import short_name

# Inches.
_IMAGE, _CELL_WIDTH, _CELL_HEIGHT = 0.95, 1.25, 1.4
_LEFT, _GAP, _TOP, _LINE = 1.0, 0.35, 0.55, 0.13
_TITLE_LINE = 0.22

_PIXELS: dict[str, Any] = {'interpolation': 'nearest', 'cmap': 'gray', 'vmin': 0, 'vmax': 255, 'aspect': 'auto'}
_LONGEST_NAME = 14  # Letters that fit below an image.


def contact_sheet(data: FigureData) -> Drawing:
  """One row per exit: the most confident images on the left, the least confident on the right."""
  sheet, count = data.sheet, len(data.exits)
  columns = max((np.sum((sheet.exits == k) & ~sheet.hard) for k in range(count)), default=0) or 1
  width = _LEFT + 2 * columns * _CELL_WIDTH + _GAP
  # With few columns the title and the headings need more room than the images.
  figure_width = max(width, 7.0)
  title = wrapped_title(data, 'the easiest and hardest test images of each exit', figure_width)
  top = _TOP + _TITLE_LINE * (title.count('\n') + 1)
  height = top + count * _CELL_HEIGHT
  figure = Figure(figsize=(figure_width, height), dpi=150)
  figure.text(0.5, 1 - 0.1 / height, title, ha='center', va='top', fontsize='large', parse_math=False)
  axes = figure.add_axes((0, 0, 1, 1))
  # One Axes measured in inches from the top left corner gives every image an exact place.
  axes.set(xlim=(0, figure_width), ylim=(height, 0))
  axes.set_axis_off()
  right = _LEFT + columns * _CELL_WIDTH + _GAP
  axes.text(_LEFT, top - 0.12, 'most confident', fontsize='medium', fontstyle='italic')
  axes.text(right, top - 0.12, 'least confident', fontsize='medium', fontstyle='italic')
  for k, number in enumerate(data.exits):
    y = top + k * _CELL_HEIGHT
    share = data.shares['test'][k]
    exiting = f'{100 * share:.1f} %\nexit here' if share else 'no image\nexits here'
    axes.text(0.15, y + 0.12, f'exit {number}', fontweight='bold', va='center')
    axes.text(0.15, y + 0.28, exiting, fontsize=8, color='0.35', va='top')
    for hard, x in ((False, _LEFT), (True, right)):
      for column, member in enumerate(np.flatnonzero((sheet.exits == k) & (sheet.hard == hard)).tolist()):
        _draw_image(axes, data, member, x + column * _CELL_WIDTH, y)
  rows = [
    {
      'exit': data.exits[sheet.exits[member]],
      'among': 'hardest' if sheet.hard[member] else 'easiest',
      'test_image': sheet.numbers[member],
      'label' if data.labeled else 'last_exit': data.class_names[sheet.labels[member]],
      'prediction': data.class_names[sheet.predictions[member]],
      'probability': sheet.probabilities[member],
    }
    for member in range(len(sheet.exits))
  ]
  return Drawing(figure, rows)


def _draw_image(axes: Axes, data: FigureData, member: int, x: float, y: float) -> None:
  sheet = data.sheet
  image = sheet.images[member]
  tall, wide = _IMAGE * np.array(image.shape[:2]) / max(image.shape[:2])
  pixels = image if image.shape[-1] == 3 else image[..., 0]
  axes.imshow(pixels, extent=(x, x + wide, y + tall, y), **_PIXELS)
  label, prediction = sheet.labels[member], sheet.predictions[member]
  caption = f'{short_name(data.class_names[prediction], _LONGEST_NAME)}, {100 * sheet.probabilities[member]:.0f} %'
  _caption(axes, x, y + _IMAGE + _LINE, caption)
  if label != prediction:
    whose = 'true' if data.labeled else f'exit {data.exits[-1]}'
    truth = f'{whose}: {short_name(data.class_names[label], _LONGEST_NAME)}'
    _caption(axes, x, y + _IMAGE + 2 * _LINE, truth, color=VERMILLION)


def _caption(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
  """Writes a line below an image, clipped where the next image begins."""
  cell = TransformedBbox(Bbox.from_bounds(x, y - 1, _CELL_WIDTH - 0.03, 2), axes.transData)
  axes.text(x, y, text, fontsize=7, parse_math=False, clip_on=True, **style).set_clip_box(cell)
