"""Common style of all figures: colors, axes, and PNG files that are written atomically."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from paranet_jax.host.files import replacing

# Okabe and Ito's palette for color-blind readers, without yellow, which is hard to see on white.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLORS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#E69F00',
  '#56B4E9',
  '#000000',
)


@contextlib.contextmanager
def own_style() -> Iterator[None]:
  """Draws with matplotlib's defaults, whatever the user's matplotlibrc asks for, such as LaTeX."""
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    yield


def exit_color(number: int) -> str:
  """The color of exit `number`, counted from 1."""
  return COLORS[(number - 1) % len(COLORS)]


def bare(axes: Axes) -> None:
  """Draws a light grid behind the data, and no frame at the top and on the right."""
  axes.grid(color='0.9')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def logarithmic(axis: XAxis | YAxis) -> None:
  """Makes an axis logarithmic, with ticks in plain numbers."""
  axis.axes.set(**{f'{axis.axis_name}scale': 'log'})
  axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axis.set_major_formatter(StrMethodFormatter('{x:g}'))
  axis.set_minor_locator(NullLocator())


def save_figure(figure: Figure, path: Path) -> None:
  """Writes a PNG file atomically."""
  with replacing(path, 'wb') as file, warnings.catch_warnings(), own_style():
    # A character that the font lacks becomes a box; one warning per character is noise.
    warnings.filterwarnings('ignore', message='Glyph .* missing from font')
    figure.savefig(file, format='png')
