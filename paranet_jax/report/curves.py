"""The picture of a run: cross-entropy and accuracy of each exit against epochs."""

import json
import os
import re
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paranet_jax.report.metrics import read_metrics
from paranet_jax.report.plots import bare, exit_colour, logarithmic, save_figure

FILE_NAME = 'curves.png'

_STYLES = {
  'train': {'linestyle': '-', 'linewidth': 0.8, 'alpha': 0.5},
  'held_out': {'linestyle': '--', 'linewidth': 1.5, 'marker': 's', 'markersize': 4, 'markerfacecolor': 'white'},
  'test': {'linestyle': '-', 'linewidth': 1.8, 'marker': 'o', 'markersize': 5},
}
_MAX_MARKED = 40  # points of a curve; with more the markers would touch
_MAX_TRAIN_POINTS = 300  # with more the noise would hide the other curves

# (exit, split) -> epochs [N], values [N]
Series = dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]


def draw_curves(workdir: str | os.PathLike) -> Path:
  """Draws `workdir/metrics.jsonl` into `workdir/curves.png`, atomically, and returns the picture's path.

  Raises:
    UserError: if the measurements cannot be read, as `read_metrics`.
  """
  path = Path(workdir) / FILE_NAME
  save_figure(curves_figure(workdir), path)
  return path


def curves_figure(workdir: str | os.PathLike) -> Figure:
  """Returns the picture: cross-entropy (nats) on the left, accuracy (%) on the right, against epochs.

  Cross-entropy is `exit_p/nll`; where a split has none of an exit, `exit_p/loss` takes its place and the axis says so.
  A panel without measurements says that too. Long training curves are averaged over neighbouring points.

  Raises:
    UserError: if the measurements cannot be read, as `read_metrics`.
  """
  # A checkpoint may be evaluated again after later ones.
  records = sorted(read_metrics(workdir), key=lambda record: record['step'])
  entropy, loss, accuracy = (_series(records, quantity) for quantity in ('nll', 'loss', 'accuracy'))
  figure = Figure(figsize=(10, 4.8), dpi=150, layout='constrained')
  figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.03)
  figure.suptitle(_title(Path(workdir)))
  left, right = figure.subplots(1, 2)
  _draw_panel(left, loss | entropy, 'cross-entropy (nats)' if loss.keys() <= entropy.keys() else 'loss')
  _draw_panel(right, {key: (x, 100 * y) for key, (x, y) in accuracy.items()}, 'accuracy (%)')
  _choose_scale(left, loss | entropy)
  _draw_legend(figure, loss.keys() | entropy.keys() | accuracy.keys())
  return figure


def _series(records: list[dict], quantity: str) -> Series:
  points: dict[tuple[int, str], list] = {}
  for record in records:
    for key, value in record.items():
      match = re.fullmatch(rf'exit_(\d+)/{quantity}', key)
      if match and record['split'] in _STYLES:
        # A loss that was not finite was written as null: a gap in the curve.
        points.setdefault((int(match[1]), record['split']), []).append(
          (record['epoch'], np.nan if value is None else value)
        )
  series = {key: tuple(np.array(pairs, dtype=float).T) for key, pairs in points.items()}
  return {key: (x, y) for key, (x, y) in series.items() if np.isfinite(y).any()}


def _draw_panel(axes: Axes, series: Series, label: str) -> None:
  axes.set_xlabel('epoch')
  axes.set_ylabel(label)
  bare(axes)
  # Test curves last, on top of the noisier ones.
  for (number, split), (x, y) in sorted(series.items(), key=lambda item: list(_STYLES).index(item[0][1])):
    if split == 'train':
      x, y = _thin(x), _thin(y)
    style = _STYLES[split] | ({} if len(x) <= _MAX_MARKED else {'marker': None})
    axes.plot(x, y, color=exit_colour(number), **style)
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
  """A logarithmic axis where losses span more than a factor of ten, with ticks in plain numbers."""
  values = np.concatenate([y[np.isfinite(y)] for _, y in series.values()]) if series else np.ones(1)
  if 0 < 10 * values.min() < values.max():
    logarithmic(axes.yaxis)


def _draw_legend(figure: Figure, keys: set[tuple[int, str]]) -> None:
  """One legend below both panels: a colour for each exit, a line style for each split."""
  exits = sorted({number for number, _ in keys})
  splits = [split for split in _STYLES if split in {split for _, split in keys}]
  handles = [Line2D([], [], color=exit_colour(number), linewidth=3, label=f'exit {number}') for number in exits]
  handles += [Line2D([], [], color='0.3', label=split.replace('_', ' '), **_STYLES[split]) for split in splits]
  if handles:
    figure.legend(handles=handles, loc='outside lower center', ncols=min(len(handles), 8), frameon=False)


def _title(workdir: Path) -> str:
  path = workdir / 'config.json'
  config = json.loads(path.read_text()) if path.exists() else {}
  name, dataset = config.get('name'), config.get('data', {}).get('name')
  return f'{name} on {dataset}' if name and dataset else name or workdir.resolve().name
