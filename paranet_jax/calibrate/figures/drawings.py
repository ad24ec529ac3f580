"""The figures against cost (anytime, budgeted, risk) and those by exit (reliability, histogram)."""

import itertools
import math
import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from paranet_jax.calibrate.figures.figure_data import SPLITS, FigureData, Reliability
from paranet_jax.display.plots import BLACK, BLUE, GREEN, ORANGE, SKY, VERMILLION, bare, logarithmic
from paranet_jax.early.policies.risk import LOSSES
from paranet_jax.host.errors import printable

Style = dict[str, Any]

_CHOSEN: Style = {'linestyle': '', 'marker': '*', 'markersize': 20, 'color': ORANGE, 'markeredgecolor': BLACK}
_CHOSEN |= {'zorder': 3}
_FAMILIES: dict[str, tuple[str, Style]] = {
  'oracle': ('oracle bound', {'color': BLACK, 'linestyle': ':', 'marker': 'd', 'markersize': 4}),
  'quota': ('quota family', {'color': SKY, 'linewidth': 1, 'marker': '.', 'markersize': 5}),
  'envelope': ('envelope of the quota family', {'color': BLUE, 'linewidth': 1.5}),
  'optimal': ('optimal thresholds', {'color': VERMILLION, 'linewidth': 1.5}),
  'patience': ('patience', {'color': VERMILLION, 'linewidth': 1.5, 'marker': 's', 'markersize': 5}),
}
_SPLIT_STYLES: dict[str, Style] = {
  'held_out': {'color': VERMILLION, 'linestyle': '--', 'markerfacecolor': 'white'},
  'test': {'color': BLUE, 'linestyle': '-'},
}
_STATES: dict[str, Style] = {
  'before': {'color': VERMILLION, 'linestyle': '--', 'marker': 's', 'markersize': 4, 'markerfacecolor': 'white'},
  'after': {'color': BLUE, 'linestyle': '-', 'marker': 'o', 'markersize': 4},
}
_MIN_ACCURACY_SPAN = 2  # Percentage points on an axis: a smaller span would magnify noise.
_MIN_RISK_SPAN = 1  # % of images.
_COST_RATIO, _SPEED_RATIO = 20, 4  # An axis that spans a larger ratio is logarithmic.
_COLUMNS = 5  # Reliability panels in a row.
_MIN_IMAGES = 10  # The accuracy of a bin with fewer is noise: only its count is drawn.


class Drawing(NamedTuple):
  """A figure and its numbers.

  Attributes:
    rows: the numbers, all with the same keys, which name the unit; None or NaN where there is no number.
    facts: what holds for all rows.
  """

  figure: Figure
  rows: list[dict[str, Any]]
  facts: dict[str, Any] = {}


def anytime(data: FigureData) -> Drawing:
  """Accuracy of each exit against its cost alone: multiply-adds, and milliseconds if they were measured."""
  costs = {'macs': data.macs} | ({} if data.ms is None else {'ms': data.ms})
  figure = _new_figure(data, f'{data.kind} of each exit alone', 5.6 * len(costs) + 1, 4.8)
  panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
  for axes, (unit, values) in zip(panels, costs.items(), strict=True):
    factor, words = cost_scale(unit, values)
    order = np.argsort(values, kind='stable')
    x = values[order] / factor
    for split in SPLITS:
      y = 100 * data.accuracy[split][order]
      if split == 'test':
        _numbered_marks(axes, x, y, data.exits[order], label=_split_label(data, split), **_SPLIT_STYLES[split])
      else:
        axes.plot(x, y, marker='s', markersize=5, label=_split_label(data, split), **_SPLIT_STYLES[split])
    measured = textwrap.fill(data.measured, 64)
    _accuracy_axes(axes, x, f'cost ({words})' if unit == 'macs' else f'time ({words})\n{measured}')
  panels[0].set_ylabel(data.axis)
  _legend(figure)
  rows = [
    {'exit': number, 'cost_macs': data.macs[k], 'cost_ms': None if data.ms is None else data.ms[k]}
    | {f'{split}_{data.kind}_percent': 100 * data.accuracy[split][k] for split in SPLITS}
    for k, number in enumerate(data.exits)
  ]
  return Drawing(figure, rows, {'measured': data.measured or None})


def budgeted(data: FigureData) -> Drawing:
  """Accuracy against mean cost: every family of thresholds, the oracle, single exits and the chosen point."""
  figure = _new_figure(data, f'{data.kind} for every budget', 12, 5.4)
  factor, words = cost_scale(data.unit, data.alone)
  panels = dict(zip(SPLITS, figure.subplots(1, 2, sharex=True, sharey=True), strict=True))
  for split, axes in panels.items():
    for family, curves in data.families.items():
      label, style = _FAMILIES[family]
      axes.plot(curves[split].cost / factor, 100 * curves[split].accuracy, label=label, **style)
    x, y = data.alone / factor, 100 * data.accuracy[split]
    _numbered_marks(axes, x, y, data.exits, color=GREEN, label='one exit for all images')
    axes.plot(data.chosen[split].cost / factor, 100 * data.chosen[split].accuracy, label='chosen', **_CHOSEN)
    axes.set_title(_split_label(data, split), fontsize='medium')
  for axes in panels.values():  # Only after both are drawn: they share their axes.
    _accuracy_axes(axes, data.alone, f'mean cost ({words})')
  panels['held_out'].set_ylabel(data.axis)
  _legend(figure)
  curves = data.families | {'chosen': data.chosen}
  points = []
  for family, split in itertools.product(curves, SPLITS):
    points += [(split, family, *point) for point in zip(*curves[family][split], strict=True)]
  for k, number in enumerate(data.exits):
    points += [(split, f'exit {number}', data.alone[k], data.accuracy[split][k]) for split in SPLITS]
  rows = [
    {'split': split, 'family': family, f'mean_cost_{data.unit}': cost, f'{data.kind}_percent': 100 * accuracy}
    for split, family, cost, accuracy in points
  ]
  return Drawing(figure, rows)


def risk(data: FigureData) -> Drawing:
  """Risk against speed-up for one threshold shared by all exits, with the chosen point and the target risk."""
  figure = _new_figure(data, 'answers lost by exiting early', 7.4, 5)
  axes = figure.subplots()
  for split in SPLITS:
    curve, chosen = data.risk.curves[split], data.risk.chosen[split]
    style = _SPLIT_STYLES[split]
    axes.plot(curve.speed_up, 100 * curve.risk, label=_split_label(data, split), **style)
    fill: Style = {'markerfacecolor': 'white'} if split == 'held_out' else {}
    axes.plot(chosen.speed_up, 100 * chosen.risk, label=f'chosen, {split.replace("_", " ")}', **_CHOSEN | fill)
  if data.risk.epsilon is not None:
    axes.axhline(100 * data.risk.epsilon, color=BLACK, linewidth=1, linestyle=':', label='target risk')
  unit = {'macs': 'multiply-adds'}.get(data.unit, data.unit)
  axes.set_xlabel(f'speed-up over exit {data.exits[-1]} alone (factor, in {unit})')
  axes.set_ylabel(f'risk (% of images):\n{LOSSES[data.risk.loss]}')
  bare(axes)
  highest = max(axes.get_ylim()[1], _MIN_RISK_SPAN)
  axes.set_ylim(-0.04 * highest, highest)
  speed_ups = np.concatenate([curve.speed_up for curve in data.risk.curves.values()])
  # Targets are small risks, at the slow end.
  if speed_ups.max() > _SPEED_RATIO * speed_ups.min():
    logarithmic(axes.xaxis)
  _legend(figure, columns=3 if data.risk.epsilon is not None else 2)
  at = {'shared threshold': (data.risk.thresholds, data.risk.curves), 'chosen': ([None], data.risk.chosen)}
  rows = [
    {'split': split, 'point': point, 'threshold': threshold, 'speed_up': speed_up, 'risk_percent': 100 * risk}
    for point, (thresholds, curves) in at.items()
    for split in SPLITS
    for threshold, speed_up, risk in zip(thresholds, *curves[split], strict=True)
  ]
  return Drawing(figure, rows, {'loss': data.risk.loss, 'epsilon': data.risk.epsilon})


def reliability(data: FigureData) -> Drawing:
  """Accuracy against confidence in 15 bins, before and after temperature scaling: a panel per exit, counts below."""
  count = len(data.exits)
  lines = math.ceil(count / _COLUMNS)
  columns = math.ceil(count / lines)
  what = f'reliability, {_split_label(data, "test")}, bins of {_MIN_IMAGES} or more'
  figure = _new_figure(data, what, max(2.5 * columns + 0.6, 5.4), 3.8 * lines + 1)
  heights = (3, 1) * lines
  grid = figure.subplots(2 * lines, columns, sharex=True, squeeze=False, gridspec_kw={'height_ratios': heights})
  for place in range(lines * columns):
    line, column = divmod(place, columns)
    upper, lower = grid[2 * line : 2 * line + 2, column]
    if place >= count:
      upper.remove()
      lower.remove()
      continue
    _diagram(upper, data.reliability[place], data.exits[place])
    _counts(lower, data.reliability[place])
    lower.tick_params(labelbottom=True)  # There may be no panel below.
    lower.set_xlabel('confidence (%)')
    if column == 0:
      upper.set_ylabel(data.axis)
      lower.set_ylabel('images (%)')
  _legend(figure, columns=3 if columns > 1 else 1)
  rows = [
    {
      'exit': number,
      'temperature': exit_.temperature if state == 'after' else 1.0,
      'state': state,
      'bin': index,
      'images': images,
      'confidence_percent': 100 * confidence if images else None,
      f'{data.kind}_percent': 100 * accuracy if images else None,
      'ece_percent': 100 * bins.ece,
    }
    for number, exit_ in zip(data.exits, data.reliability, strict=True)
    for state, bins in zip(_STATES, exit_[1:], strict=True)
    for index, (images, confidence, accuracy) in enumerate(zip(*bins[:3], strict=True), 1)
  ]
  return Drawing(figure, rows)


def _diagram(axes: Axes, exit_: Reliability, number: int) -> None:
  axes.plot((0, 100), (0, 100), color='0.6', linewidth=1, label='perfectly calibrated')
  for (state, style), bins in zip(_STATES.items(), exit_[1:], strict=True):
    filled = bins.counts >= _MIN_IMAGES
    x, y = 100 * bins.confidence[filled], 100 * bins.accuracy[filled]
    (line,) = axes.plot(x, y, label=f'{state} temperature', clip_on=False, **style)
    line.set_in_layout(bool(filled.any()))  # Without points it counts as one at the figure's corner.
  ece = f'ECE {100 * exit_.before.ece:.1f} % → {100 * exit_.after.ece:.1f} %'
  axes.set_title(f'exit {number}, T = {exit_.temperature:.3g}\n{ece}', fontsize='medium')
  axes.set(xlim=(0, 100), ylim=(0, 100), xticks=range(0, 101, 25), yticks=range(0, 101, 25))
  bare(axes)


def _counts(axes: Axes, exit_: Reliability) -> None:
  for (state, style), bins in zip(_STATES.items(), exit_[1:], strict=True):
    edges = np.linspace(0, 100, len(bins.counts) + 1)
    fill: Style = {'fill': True, 'alpha': 0.25, 'linewidth': 0} if state == 'after' else {'linestyle': '--'}
    axes.stairs(100 * bins.counts / bins.counts.sum(), edges, color=style['color'], **fill)
  axes.set_ylim(bottom=0)
  axes.locator_params(axis='y', nbins=2)
  bare(axes)


def histogram(data: FigureData) -> Drawing:
  """The share of images that exit at each exit, and the accuracy on those images."""
  figure = _new_figure(data, 'where images exit', max(7.0, 0.8 * len(data.exits) + 3), 6)
  upper, lower = figure.subplots(2, 1, sharex=True)
  places = np.arange(len(data.exits))
  styles = ({'color': 'white', 'edgecolor': VERMILLION, 'hatch': '////'}, {'color': BLUE, 'edgecolor': BLUE})
  for offset, split, style in zip((-0.2, 0.2), SPLITS, styles, strict=True):
    for axes, values in ((upper, data.shares[split]), (lower, data.accuracy_there[split])):
      heights = 100 * np.nan_to_num(values)
      bars = axes.bar(places + offset, heights, 0.36, label=_split_label(data, split), **style)
      texts = ['' if np.isnan(value) else f'{100 * value:.1f}' for value in values]
      axes.bar_label(bars, texts, fontsize=7, padding=1)
  upper.set_ylabel('images that exit here (%)')
  lower.set_ylabel('accuracy on these images (%)' if data.labeled else f'{data.axis[:-4]},\non these images (%)')
  lower.set_xticks(places, [f'exit {number}' for number in data.exits])
  lower.set_xlim(-0.8, len(places) - 0.2)
  for axes in (upper, lower):
    bare(axes)
    axes.grid(axis='x', visible=False)
    axes.margins(y=0.12)
  lower.set(ylim=(0, 112), yticks=range(0, 101, 20))
  _legend(figure, columns=2)
  rows = [
    {'split': split, 'exit': number, 'share_percent': 100 * share, f'{data.kind}_percent': 100 * accuracy}
    for split in SPLITS
    for number, share, accuracy in zip(data.exits, data.shares[split], data.accuracy_there[split], strict=True)
  ]
  return Drawing(figure, rows)


def wrapped_title(data: FigureData, what: str, width: float) -> str:
  """The run, the data set and what is shown, in lines of 12 point text that fit `width` inches."""
  name = textwrap.fill(printable(f'{data.run} on {data.dataset}'), int(9 * width))
  return f'{name}\n{what}'


def cost_scale(unit: str, costs: np.ndarray) -> tuple[float, str]:
  """Returns a divisor for the costs and the unit of the result."""
  if unit != 'macs':
    return 1.0, f'{unit} per image'
  for least, size, letter in ((1e10, 1e9, 'G'), (1e5, 1e6, 'M')):
    if np.max(costs) >= least:
      return size, f'{letter} multiply-adds per image'
  return 1e3, 'k multiply-adds per image'


def _new_figure(data: FigureData, what: str, width: float, height: float) -> Figure:
  layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.03)
  figure = Figure(figsize=(width, height), dpi=150, layout=layout)
  figure.suptitle(wrapped_title(data, what, width), parse_math=False)
  return figure


def _split_label(data: FigureData, split: str) -> str:
  return f'{split.replace("_", " ")} ({data.images[split]:,} images)'


def _numbered_marks(axes: Axes, x: np.ndarray, y: np.ndarray, numbers: Iterable[int], **style: Any) -> None:
  """Draws discs that contain the exit numbers, joined by a line if `style` has a linestyle."""
  axes.plot(x, y, **{'linestyle': '', 'marker': 'o', 'markersize': 11, 'markeredgecolor': 'white', 'zorder': 4} | style)
  for number, left, up in zip(numbers, x, y, strict=True):
    axes.annotate(
      str(number), (left, up), color='white', fontsize=7, fontweight='bold', ha='center', va='center_baseline', zorder=5
    )


def _accuracy_axes(axes: Axes, costs: np.ndarray, label: str) -> None:
  axes.set_xlabel(label)
  bare(axes)
  low, high = axes.get_ylim()
  missing = max(0.0, _MIN_ACCURACY_SPAN - (high - low)) / 2
  axes.set_ylim(low - missing, high + missing)
  if costs.max() > _COST_RATIO * costs.min():
    logarithmic(axes.xaxis)
  else:
    axes.set_xlim(left=0)


def _legend(figure: Figure, columns: int = 6) -> None:
  handles, labels = figure.axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=min(len(labels), columns), frameon=False)
