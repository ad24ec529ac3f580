"""Accuracy and risk against cost: the anytime, budgeted and risk figures."""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paranet_jax.calibrate.figures.drawing import CHOSEN, Drawing, cost_scale, new_figure, numbered_marks, split_label
from paranet_jax.calibrate.figures.figure_types import SPLITS, FigureData
from paranet_jax.report.plots import BLACK, BLUE, GREEN, SKY, VERMILLION, bare, logarithmic

_FAMILIES = {
  'oracle': ('oracle bound', {'color': BLACK, 'linestyle': ':', 'marker': 'd', 'markersize': 4}),
  'quota': ('quota family', {'color': SKY, 'linewidth': 1, 'marker': '.', 'markersize': 5}),
  'envelope': ('envelope of the quota family', {'color': BLUE, 'linewidth': 1.5}),
  'optimal': ('optimal thresholds', {'color': VERMILLION, 'linewidth': 1.5}),
  'patience': ('patience', {'color': VERMILLION, 'linewidth': 1.5, 'marker': 's', 'markersize': 5}),
}
_SPLIT_STYLES = {
  'held_out': {'color': VERMILLION, 'linestyle': '--', 'markerfacecolor': 'white'},
  'test': {'color': BLUE, 'linestyle': '-'},
}
_LOSSES = {'gap': 'right in full, wrong early', 'disagreement': 'another answer than in full'}
_FEWEST_POINTS = 2  # of accuracy (%) on an axis: less would show noise as if it mattered
_LEAST_RISK = 1  # % of images, on an axis
_SPAN, _SPAN_OF_SPEED = 20, 4  # costs and speed-ups further apart than these factors get a logarithmic axis


def anytime(data: FigureData) -> Drawing:
  """Accuracy of each exit against its cost alone: multiply-adds, and milliseconds where they were measured."""
  costs = {'macs': data.macs} | ({} if data.ms is None else {'ms': data.ms})
  figure = new_figure(data, 'accuracy of each exit alone', 5.6 * len(costs) + 1, 4.8)
  panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
  for axes, (unit, values) in zip(panels, costs.items(), strict=True):
    factor, words = cost_scale(unit, values)
    order = np.argsort(values, kind='stable')
    x = values[order] / factor
    for split in SPLITS:
      y = 100 * data.accuracy[split][order]
      if split == 'test':
        numbered_marks(axes, x, y, data.exits[order], label=split_label(data, split), **_SPLIT_STYLES[split])
      else:
        axes.plot(x, y, marker='s', markersize=5, label=split_label(data, split), **_SPLIT_STYLES[split])
    measured = textwrap.fill(data.measured, 64)
    _axes_of_accuracy(axes, x, f'cost ({words})' if unit == 'macs' else f'time ({words})\n{measured}')
  panels[0].set_ylabel('accuracy (%)')
  _legend(figure)
  rows = [
    {'exit': int(number), 'cost_macs': data.macs[k], 'cost_ms': None if data.ms is None else data.ms[k]}
    | {f'{split}_accuracy_percent': 100 * data.accuracy[split][k] for split in SPLITS}
    for k, number in enumerate(data.exits)
  ]
  return Drawing(figure, rows, {'measured': data.measured or None})


def budgeted(data: FigureData) -> Drawing:
  """Accuracy against mean cost: every family of thresholds, the oracle, single exits and the chosen point."""
  figure = new_figure(data, 'accuracy for every budget', 12, 5.4)
  factor, words = cost_scale(data.unit, data.alone)
  panels = dict(zip(SPLITS, figure.subplots(1, 2, sharex=True, sharey=True), strict=True))
  for split, axes in panels.items():
    for family, curves in data.families.items():
      label, style = _FAMILIES[family]
      axes.plot(curves[split].cost / factor, 100 * curves[split].accuracy, label=label, **style)
    x, y = data.alone / factor, 100 * data.accuracy[split]
    numbered_marks(axes, x, y, data.exits, color=GREEN, label='one exit for all images')
    axes.plot(data.chosen[split].cost / factor, 100 * data.chosen[split].accuracy, label='chosen', **CHOSEN)
    axes.set_title(split_label(data, split), fontsize='medium')
  for axes in panels.values():  # Not before both are drawn: their axes are the same.
    _axes_of_accuracy(axes, data.alone, f'mean cost ({words})')
  panels['held_out'].set_ylabel('accuracy (%)')
  _legend(figure)
  return Drawing(figure, _budgeted_rows(data))


def _budgeted_rows(data: FigureData) -> list[dict]:
  families = data.families | {'chosen': data.chosen}
  rows = [
    {'split': split, 'family': family, f'mean_cost_{data.unit}': cost, 'accuracy_percent': 100 * accuracy}
    for family, curves in families.items()
    for split in SPLITS
    for cost, accuracy in zip(*curves[split], strict=True)
  ]
  return rows + [
    {
      'split': split,
      'family': f'exit {number}',
      f'mean_cost_{data.unit}': data.alone[k],
      'accuracy_percent': 100 * data.accuracy[split][k],
    }
    for k, number in enumerate(data.exits)
    for split in SPLITS
  ]


def risk(data: FigureData) -> Drawing:
  """Risk against speed-up for one threshold shared by all exits, with the chosen point and the risk asked for."""
  figure = new_figure(data, 'what leaving early costs in answers', 7.4, 5)
  axes = figure.subplots()
  for split in SPLITS:
    curve, chosen = data.risk.curves[split], data.risk.chosen[split]
    style = _SPLIT_STYLES[split]
    axes.plot(curve.speed_up, 100 * curve.risk, label=split_label(data, split), **style)
    fill = {'markerfacecolor': 'white'} if split == 'held_out' else {}
    axes.plot(chosen.speed_up, 100 * chosen.risk, label=f'chosen, {split.replace("_", " ")}', **CHOSEN | fill)
  if data.risk.epsilon is not None:
    axes.axhline(100 * data.risk.epsilon, color=BLACK, linewidth=1, linestyle=':', label='risk asked for')
  unit = 'ms' if data.unit == 'ms' else 'multiply-adds'
  axes.set_xlabel(f'speed-up against exit {data.exits[-1]} alone (times, in {unit})')
  axes.set_ylabel(f'risk: {_LOSSES[data.risk.loss]} (% of images)')
  bare(axes)
  highest = max(axes.get_ylim()[1], _LEAST_RISK)
  axes.set_ylim(-0.04 * highest, highest)
  speed_ups = np.concatenate([curve.speed_up for curve in data.risk.curves.values()])
  # What is promised is a small risk, at the slow end.
  if speed_ups.max() > _SPAN_OF_SPEED * speed_ups.min():
    logarithmic(axes.xaxis)
  _legend(figure, columns=3 if data.risk.epsilon is not None else 2)
  return Drawing(figure, _risk_rows(data), {'loss': data.risk.loss, 'epsilon': data.risk.epsilon})


def _risk_rows(data: FigureData) -> list[dict]:
  rows = [
    {'split': split, 'point': 'shared threshold', 'threshold': at, 'speed_up': speed_up, 'risk_percent': 100 * risk}
    for split in SPLITS
    for at, speed_up, risk in zip(data.risk.thresholds, *data.risk.curves[split], strict=True)
  ]
  return rows + [
    {'split': split, 'point': 'chosen', 'threshold': None, 'speed_up': speed_up, 'risk_percent': 100 * risk}
    for split in SPLITS
    for speed_up, risk in zip(*data.risk.chosen[split], strict=True)
  ]


def _axes_of_accuracy(axes: Axes, costs: np.ndarray, label: str) -> None:
  axes.set_xlabel(label)
  bare(axes)
  low, high = axes.get_ylim()
  missing = max(0.0, _FEWEST_POINTS - (high - low)) / 2
  axes.set_ylim(low - missing, high + missing)
  if costs.max() > _SPAN * costs.min():
    logarithmic(axes.xaxis)
  else:
    axes.set_xlim(left=0)


def _legend(figure: Figure, columns: int = 6) -> None:
  handles, labels = figure.axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=min(len(labels), columns), frameon=False)
