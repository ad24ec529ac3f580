"""figure2.png: accuracy against cost of the three exits, ours and the paper's, with published systems."""

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paranet_jax.display.plots import BLUE, GREEN, ORANGE, PURPLE, VERMILLION, bare, logarithmic, own_style
from paranet_jax.experiments.markdown import conditions

_PUBLISHED = ((GREEN, '^'), (ORANGE, 'D'), (PURPLE, 'v'))
_MILLION = 1e6


@own_style()
def anytime_figure(section: dict[str, Any], protocol: str) -> Figure:
  """The picture of a `results.section`. Published systems appear only if they were measured on the same data set."""
  figure = Figure(figsize=(8, 5.6), dpi=150)
  figure.set_layout_engine('constrained', w_pad=0.1, h_pad=0.08)
  figure.suptitle('ParaNet PN3-ddd: accuracy for a compute budget')
  axes = figure.subplots()
  axes.set_title(textwrap.fill(conditions(section, protocol), 100), fontsize='small')
  _draw_ours(axes, section)
  if section['dataset'] == 'cifar100':
    _draw_others(axes, section)
  axes.set_xlabel('cost per image, exits tried in turn (M multiply-adds)')
  axes.set_ylabel(f'test accuracy on {section["dataset"]} (%)')
  axes.margins(0.08)
  bare(axes)
  logarithmic(axes.xaxis)
  figure.legend(loc='outside lower center', ncols=2, frameon=False)
  return figure


def _draw_ours(axes: Axes, section: dict[str, Any]) -> None:
  rows = section['rows']
  macs = np.array([row['macs'] for row in rows]) / _MILLION
  accuracy = [row['ours'] for row in rows]
  axes.plot(macs, accuracy, color=BLUE, marker='o', linewidth=1.8, label='PN3-ddd, ours', zorder=3)
  if len(section['seeds']) > 1:
    axes.errorbar(macs, accuracy, [row['std'] for row in rows], color=BLUE, fmt='none', capsize=4, zorder=3)
  for row, x in zip(rows, macs, strict=True):
    place = {'xytext': (-6, 6), 'textcoords': 'offset points', 'ha': 'right', 'color': BLUE, 'fontsize': 'small'}
    axes.annotate(f'exit {row["exit"]}', (x, row['ours']), **place)


def _draw_others(axes: Axes, section: dict[str, Any]) -> None:
  paper = section['paper']
  macs = [point['macs'] / _MILLION for point in paper]
  style = {'color': VERMILLION, 'marker': 's', 'linewidth': 1.8, 'linestyle': '--'}
  axes.plot(macs, [point['accuracy'] for point in paper], label='PN3-ddd, the paper (costs by our count)', **style)
  for curve, (color, marker) in zip(section['published'], _PUBLISHED, strict=True):
    style = {'color': color, 'marker': marker, 'linewidth': 1, 'markersize': 5}
    axes.plot(curve['macs_millions'], curve['accuracy'], label=f'{curve["label"]} (published)', **style)
