"""The figures of a calibrated run."""

from pathlib import Path

from paranet_jax.early.calibration import Calibrated
from paranet_jax.early.figure_data import figure_data
from paranet_jax.early.figures import draw_figures

FOLDER = 'exits'


def draw(workdir: Path, calibrated: Calibrated) -> list[Path]:
  """Draws the figures into `workdir/exits`; returns the files that were written."""
  subject, plan = calibrated.subject, calibrated.plan
  dataset, ms = subject.task.dataset, subject.ms
  data = figure_data(
    plan,
    calibrated.held_out,
    calibrated.test,
    ms if plan.target.get('unit') == 'ms' else subject.macs,
    dataset.test.images,
    dataset.class_names,
    ms=None if ms is None else ms.alone(),
    measured='' if ms is None else f'batch size {ms.batch_size}, {plan.latency["cpu"]}',
  )
  return draw_figures(workdir / FOLDER, data)
