"""What each exit does: its reliability, and who leaves there."""

import math

import numpy as np
from matplotlib.axes import Axes

from paranet_jax.calibrate.figures.drawing import Drawing, new_figure, split_label
from paranet_jax.calibrate.figures.figure_types import SPLITS, Bins, FigureData, Reliability
from paranet_jax.report.plots import BLUE, VERMILLION, bare

_COLUMNS = 5  # panels in a row
_FEWEST = 10  # images; the accuracy of a smaller bin is noise, and only its count is drawn
_STATES = {
  'before': {'color': VERMILLION, 'linestyle': '--', 'marker': 's', 'markersize': 4, 'markerfacecolor': 'white'},
  'after': {'color': BLUE, 'linestyle': '-', 'marker': 'o', 'markersize': 4},
}


def reliability(data: FigureData) -> Drawing:
  """Accuracy against confidence in 15 bins, before and after temperature, one panel an exit, with counts below."""
  count = len(data.exits)
  lines = math.ceil(count / _COLUMNS)
  columns = math.ceil(count / lines)
  what = f'reliability, {split_label(data, "test")}, bins of {_FEWEST} or more'
  figure = new_figure(data, what, max(2.5 * columns + 0.6, 5.4), 3.8 * lines + 1)
  heights = (3, 1) * lines
  grid = figure.subplots(2 * lines, columns, sharex=True, squeeze=False, gridspec_kw={'height_ratios': heights})
  for place in range(lines * columns):
    line, column = divmod(place, columns)
    upper, lower = grid[2 * line : 2 * line + 2, column]
    if place >= count:
      upper.remove()
      lower.remove()
      continue
    _diagram(upper, data.reliability[place], int(data.exits[place]))
    _counts(lower, data.reliability[place])
    # The panel below may be absent.
    lower.tick_params(labelbottom=True)
    lower.set_xlabel('confidence (%)')
    if column == 0:
      upper.set_ylabel('accuracy (%)')
      lower.set_ylabel('images (%)')
  handles, labels = figure.axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=3 if columns > 1 else 1, frameon=False)
  return Drawing(figure, _reliability_rows(data))


def _diagram(axes: Axes, exit_: Reliability, number: int) -> None:
  axes.plot((0, 100), (0, 100), color='0.6', linewidth=1, label='perfectly calibrated')
  for state, style in _STATES.items():
    bins: Bins = getattr(exit_, state)
    filled = bins.counts >= _FEWEST
    x, y = 100 * bins.confidence[filled], 100 * bins.accuracy[filled]
    axes.plot(x, y, label=f'{state} temperature', clip_on=False, **style)
  ece = f'ECE {100 * exit_.before.ece:.1f} % → {100 * exit_.after.ece:.1f} %'
  axes.set_title(f'exit {number}, T = {exit_.temperature:.3g}\n{ece}', fontsize='medium')
  axes.set(xlim=(0, 100), ylim=(0, 100), xticks=range(0, 101, 25), yticks=range(0, 101, 25))
  bare(axes)


def _counts(axes: Axes, exit_: Reliability) -> None:
  for state, style in _STATES.items():
    bins: Bins = getattr(exit_, state)
    edges = np.linspace(0, 100, len(bins.counts) + 1)
    fill = {'fill': True, 'alpha': 0.25, 'linewidth': 0} if state == 'after' else {'linestyle': '--'}
    axes.stairs(100 * bins.counts / bins.counts.sum(), edges, color=style['color'], **fill)
  axes.set_ylim(bottom=0)
  axes.locator_params(axis='y', nbins=2)
  bare(axes)


def _reliability_rows(data: FigureData) -> list[dict]:
  rows = []
  for number, exit_ in zip(data.exits, data.reliability, strict=True):
    for state in _STATES:
      bins: Bins = getattr(exit_, state)
      for index, (images, confidence, accuracy) in enumerate(zip(*bins[:3], strict=True)):
        rows.append(
          {
            'exit': int(number),
            'temperature': exit_.temperature if state == 'after' else 1.0,
            'state': state,
            'bin': index + 1,
            'images': int(images),
            'confidence_percent': 100 * confidence if images else None,
            'accuracy_percent': 100 * accuracy if images else None,
            'ece_percent': 100 * bins.ece,
          }
        )
  return rows


def histogram(data: FigureData) -> Drawing:
  """How many images leave at each exit, and how many of those are answered right."""
  figure = new_figure(data, 'where images leave', max(7.0, 0.8 * len(data.exits) + 3), 6)
  upper, lower = figure.subplots(2, 1, sharex=True)
  places = np.arange(len(data.exits))
  styles = ({'color': 'white', 'edgecolor': VERMILLION, 'hatch': '////'}, {'color': BLUE, 'edgecolor': BLUE})
  for offset, split, style in zip((-0.2, 0.2), SPLITS, styles, strict=True):
    for axes, values in ((upper, data.shares[split]), (lower, data.accuracy_there[split])):
      heights = 100 * np.nan_to_num(values)
      bars = axes.bar(places + offset, heights, 0.36, label=split_label(data, split), **style)
      texts = ['' if np.isnan(value) else f'{100 * value:.1f}' for value in values]
      axes.bar_label(bars, texts, fontsize=7, padding=1)
  upper.set_ylabel('images that leave here (%)')
  lower.set_ylabel('of these, answered right (%)')
  lower.set_xticks(places, [f'exit {number}' for number in data.exits])
  lower.set_xlim(-0.8, len(places) - 0.2)
  for axes in (upper, lower):
    bare(axes)
    axes.grid(axis='x', visible=False)
    axes.margins(y=0.12)
  lower.set(ylim=(0, 112), yticks=range(0, 101, 20))
  handles, labels = upper.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=2, frameon=False)
  return Drawing(figure, _histogram_rows(data))


def _histogram_rows(data: FigureData) -> list[dict]:
  return [
    {
      'split': split,
      'exit': int(number),
      'share_percent': 100 * data.shares[split][k],
      'accuracy_percent': 100 * data.accuracy_there[split][k],
    }
    for split in SPLITS
    for k, number in enumerate(data.exits)
  ]
