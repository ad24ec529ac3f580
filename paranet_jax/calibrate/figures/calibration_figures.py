"""The figures of a calibrated run."""

from pathlib import Path
from typing import Any

from paranet_jax.calibrate.calibration import FIGURES, Calibrated
from paranet_jax.calibrate.figures.figure_data import figure_data
from paranet_jax.calibrate.figures.write import draw_figures
from paranet_jax.runs.dataset_facts import output_names


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
    output_names(dataset.class_names, calibrated.test.logits.shape[-1]),
    ms=None if ms is None else ms.alone(),
    measured='' if ms is None else f'batch size {ms.batch_size}, {_machine(plan.latency)}',
  )
  return draw_figures(workdir / FIGURES, data)


def _machine(latency: dict[str, Any]) -> str:
  return latency['cpu'] if latency['device'] == 'cpu' else latency['device']
