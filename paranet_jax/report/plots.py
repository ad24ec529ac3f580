"""What all pictures share: colours, bare axes, logarithmic axes in plain numbers, and files written whole."""

import warnings
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from paranet_jax.host.files import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow, which is lost on white.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLOURS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#E69F00',
  '#56B4E9',
  '#000000',
)


def exit_colour(number: int) -> str:
  """The colour of an exit, 1-based."""
  return COLOURS[(number - 1) % len(COLOURS)]


def bare(axes: Axes) -> None:
  """A light grid behind the data, and no frame above and on the right."""
  axes.grid(color='0.9')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def logarithmic(axis: Axis) -> None:
  """Makes an axis logarithmic, with ticks in plain numbers."""
  axis.axes.set(**{f'{axis.axis_name}scale': 'log'})
  axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axis.set_major_formatter(StrMethodFormatter('{x:g}'))
  axis.set_minor_locator(NullLocator())


def save_figure(figure: Figure, path: Path) -> None:
  """Writes a PNG file atomically."""
  with replacing(path, 'wb') as file, warnings.catch_warnings():
    # Names in scripts that the font lacks become boxes; a warning for each letter would help nobody.
    warnings.filterwarnings('ignore', message='Glyph .* missing from font')
    figure.savefig(file, format='png')
