"""The six figures of a calibrated run: each is a picture (PNG) and the numbers in it (JSON and CSV)."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from paranet_jax.calibrate.calibration import FIGURES, Calibrated
from paranet_jax.calibrate.figures.contact_sheet import contact_sheet
from paranet_jax.calibrate.figures.drawings import anytime, budgeted, histogram, reliability, risk
from paranet_jax.calibrate.figures.figure_data import FigureData, figure_data
from paranet_jax.display.plots import own_style, save_figure
from paranet_jax.host.files import replacing, write_json
from paranet_jax.runs.dataset_facts import output_names

FUNCTIONS = (anytime, budgeted, risk, reliability, histogram, contact_sheet)


def draw(workdir: Path, calibrated: Calibrated) -> list[Path]:
  """Draws the figures into `workdir/exits` and returns the paths of the written files."""
  subject, plan = calibrated.subject, calibrated.plan
  dataset, ms = subject.task.dataset, subject.ms
  measured = ''
  if ms is not None and plan.latency:
    device = plan.latency['device']
    measured = f'batch size {ms.batch_size}, {plan.latency["cpu"] if device == "cpu" else device}'
  data = figure_data(
    plan,
    calibrated.held_out,
    calibrated.test,
    {'ms': ms, 'joules': subject.joules}.get(plan.target.get('unit', 'macs')) or subject.macs,
    dataset.test.images,
    output_names(dataset.class_names, calibrated.test.logits.shape[-1]),
    ms=None if ms is None else ms.alone(),
    measured=measured,
    labeled=dataset.labeled,
  )
  return write_figures(workdir / FIGURES, data)


@own_style()
def write_figures(folder: Path, data: FigureData) -> list[Path]:
  """Writes NAME.png, NAME.json and NAME.csv for every figure, replacing earlier files, and returns their paths.

  The CSV has one line per point. The JSON has the same points under `rows`, with null for missing values, and the
  `figure`, `run`, `dataset` and number of `images` of each split.
  """
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for function in FUNCTIONS:
    name, drawing = function.__name__, function(data)
    picture, numbers, table = (folder / f'{name}.{suffix}' for suffix in ('png', 'json', 'csv'))
    rows = [{key: _plain(value) for key, value in row.items()} for row in drawing.rows]
    head = {'figure': name, 'run': data.run, 'dataset': data.dataset, 'images': data.images}
    save_figure(drawing.figure, picture)
    write_json(numbers, head | drawing.facts | {'rows': rows})
    with replacing(table, newline='') as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
    paths += [picture, numbers, table]
  return paths


def _plain(value: Any) -> Any:
  """Converts NumPy scalars for JSON; values that are not finite become None."""
  value = value.item() if isinstance(value, np.generic) else value
  return None if isinstance(value, float) and not np.isfinite(value) else value
