"""The figures of a calibrated run, each as a picture, as JSON and as CSV, written whole or not at all."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from paranet_jax.calibrate.figures.contact_sheet import contact_sheet
from paranet_jax.calibrate.figures.cost_figures import anytime, budgeted, risk
from paranet_jax.calibrate.figures.drawing import Drawing
from paranet_jax.calibrate.figures.exit_figures import histogram, reliability
from paranet_jax.calibrate.figures.figure_types import FigureData
from paranet_jax.host.files import replacing, write_json
from paranet_jax.report.plots import save_figure

_DRAW = {draw.__name__: draw for draw in (anytime, budgeted, risk, reliability, histogram, contact_sheet)}


def draw_figures(folder: Path, data: FigureData) -> list[Path]:
  """Writes NAME.png, NAME.json and NAME.csv of every figure, in place of earlier ones, and returns their paths.

  The CSV holds one line per point; the JSON the same under `rows`, with null for what is absent, and what it belongs
  to: `figure`, `run`, `dataset`, `images` of each split.

  Args:
    folder: made if it is not there.
    data: see `figure_data`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  return [path for name, draw in _DRAW.items() for path in _write(folder / name, draw(data), data)]


def _write(stem: Path, drawing: Drawing, data: FigureData) -> list[Path]:
  picture, numbers, table = (stem.with_name(f'{stem.name}.{suffix}') for suffix in ('png', 'json', 'csv'))
  rows = [{key: _plain(value) for key, value in row.items()} for row in drawing.rows]
  head = {'figure': stem.name, 'run': data.run, 'dataset': data.dataset, 'images': data.images}
  save_figure(drawing.figure, picture)
  write_json(numbers, head | drawing.facts | {'rows': rows})
  _write_csv(table, rows)
  return [picture, numbers, table]


def _plain(value: Any) -> Any:
  """A number as JSON has it: no NumPy types, null for what is not finite."""
  value = value.item() if isinstance(value, np.generic) else value
  return None if isinstance(value, float) and not np.isfinite(value) else value


def _write_csv(path: Path, rows: list[dict]) -> None:
  with replacing(path, newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
