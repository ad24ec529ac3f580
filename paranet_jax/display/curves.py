"""The learning curves of a run: cross-entropy and accuracy of each exit by epoch."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from paranet_jax.display.metrics import read_metrics
from paranet_jax.display.plots import bare, exit_color, logarithmic, own_style, save_figure
from paranet_jax.host.errors import printable
from paranet_jax.host.files import read_object

FILE_NAME = 'curves.png'

_STYLES: dict[str, dict[str, Any]] = {
  'train': {'linestyle': '-', 'linewidth': 0.8, 'alpha': 0.5},
  'held_out': {'linestyle': '--', 'linewidth': 1.5, 'marker': 's', 'markersize': 4, 'markerfacecolor': 'white'},
  'test': {'linestyle': '-', 'linewidth': 1.8, 'marker': 'o', 'markersize': 5},
}
_MAX_MARKED = 40  # Points per curve; more markers would touch each other.
_MAX_TRAIN_POINTS = 300  # The noise of more would hide the other curves.

Series = dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]
"""Epochs [N] and values [N] by (exit, split)."""


@own_style()
def draw_curves(workdir: str | os.PathLike) -> Path:
  """Draws `workdir/metrics.jsonl` into `workdir/curves.png` atomically and returns the path of the figure.

  Raises:
    UserError: the metrics cannot be read, see `read_metrics`.
  """
  path = Path(workdir) / FILE_NAME
  save_figure(curves_figure(workdir), path)
  return path


def curves_figure(workdir: str | os.PathLike) -> Figure:
  """Plots cross-entropy (nats) on the left and accuracy (%) on the right by epoch; without labels, the agreement.

  Cross-entropy is `exit_p/nll`, or `exit_p/loss` if a split has no `nll` for an exit; the axis label then says 'loss'.
  Long training curves are averaged over neighboring points.

  Raises:
    UserError: the metrics cannot be read, see `read_metrics`.
  """
  layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.03)
  figure = Figure(figsize=(10, 4.8), dpi=150, layout=layout)
  figure.suptitle(printable(_title(Path(workdir))), parse_math=False)
  draw_panels(figure, figure.subplots(1, 2), workdir)
  return figure


def draw_panels(figure: Figure, panels: Sequence[Axes], workdir: str | os.PathLike, columns: int = 8) -> None:
  """Plots the curves of `curves_figure` into two axes, with one legend below them.

  Args:
    panels: for cross-entropy, and for accuracy.
    columns: of the legend, at most.

  Raises:
    UserError: the metrics cannot be read, see `read_metrics`.
  """
  # An earlier checkpoint may have been evaluated after later ones.
  records = sorted(read_metrics(workdir), key=lambda record: record['step'])
  entropy, loss, accuracy, agreement = (_series(records, name) for name in ('nll', 'loss', 'accuracy', 'agreement'))
  left, right = panels
  _draw_panel(left, loss | entropy, 'cross-entropy (nats)' if loss.keys() <= entropy.keys() else 'loss')
  measured, words = (agreement, 'same answer as the last exit (%)') if agreement else (accuracy, 'accuracy (%)')
  _draw_panel(right, {key: (x, 100 * y) for key, (x, y) in measured.items()}, words)
  _choose_scale(left, loss | entropy)
  _draw_legend(figure, loss.keys() | entropy.keys() | measured.keys(), columns)


def _series(records: list[dict], quantity: str) -> Series:
  points: dict[tuple[int, str], list] = {}
  for record in records:
    for key, value in record.items():
      match = re.fullmatch(rf'exit_(\d+)/{quantity}', key)
      if match and record.get('split') in _STYLES and 'epoch' in record:
        # A loss that is not finite is saved as null and becomes a gap in the curve.
        points.setdefault((int(match[1]), record['split']), []).append(
          (record['epoch'], np.nan if value is None else value)
        )
  series = {key: tuple(np.array(pairs, dtype=float).T) for key, pairs in points.items()}
  return {key: (x, y) for key, (x, y) in series.items() if np.isfinite(y).any()}


def _draw_panel(axes: Axes, series: Series, label: str) -> None:
  axes.set_xlabel('epoch')
  axes.set_ylabel(label)
  bare(axes)
  # Test curves are drawn last, on top of noisier ones.
  for (number, split), (x, y) in sorted(series.items(), key=lambda item: list(_STYLES).index(item[0][1])):
    if split == 'train':
      x, y = _thin(x), _thin(y)
    style: dict[str, Any] = _STYLES[split] | ({} if len(x) <= _MAX_MARKED else {'marker': None})
    axes.plot(x, y, color=exit_color(number), **style)
  if series:
    axes.locator_params(axis='x', steps=(1, 2, 5, 10))
  else:
    axes.text(0.5, 0.5, 'nothing measured', transform=axes.transAxes, ha='center', color='0.5')
    axes.set(xticks=[], yticks=[])


def _thin(values: np.ndarray) -> np.ndarray:
  if len(values) <= _MAX_TRAIN_POINTS:
    return values
  return np.array([group.mean() for group in np.array_split(values, _MAX_TRAIN_POINTS)])


def _choose_scale(axes: Axes, series: Series) -> None:
  """Uses a logarithmic axis if the losses span more than a factor of ten."""
  values = np.concatenate([y[np.isfinite(y)] for _, y in series.values()]) if series else np.ones(1)
  if 0 < 10 * values.min() < values.max():
    logarithmic(axes.yaxis)


def _draw_legend(figure: Figure, keys: set[tuple[int, str]], columns: int) -> None:
  """One legend below both panels, with a color per exit and a line style per split."""
  exits = sorted({number for number, _ in keys})
  splits = [split for split in _STYLES if split in {split for _, split in keys}]
  handles = [Line2D([], [], color=exit_color(number), linewidth=3, label=f'exit {number}') for number in exits]
  handles += [Line2D([], [], color='0.3', label=split.replace('_', ' '), **_STYLES[split]) for split in splits]
  if handles:
    figure.legend(handles=handles, loc='outside lower center', ncols=min(len(handles), columns), frameon=False)


def _title(workdir: Path) -> str:
  config = read_object(workdir / 'config.json', 'restore it') or {}
  name, data = config.get('name'), config.get('data')
  dataset = data.get('name') if isinstance(data, dict) else None
  return f'{name} on {dataset}' if name and dataset else name or workdir.resolve().name
