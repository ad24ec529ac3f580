"""What `--dry-run` prints: every run, how far it is, and how long the rest will take."""

from collections.abc import Sequence

from paranet_jax.experiments.estimate import Speed, measure
from paranet_jax.experiments.runs import PlannedRun, status
from paranet_jax.report.progress import human_duration
from paranet_jax.report.tables import ABSENT, align


def dry_run(runs: Sequence[PlannedRun]) -> str:
  """Looks at the runs, and measures each network that is not finished with a few steps; writes nothing.

  Raises:
    UserError: a run's folder, the data or the devices do not fit.
  """
  found = [status(run) for run in runs]
  unfinished = {run.name: run.config for run, state in zip(runs, found, strict=True) if not state.summary}
  speeds = {name: measure(config) for name, config in unfinished.items()}
  lefts = [
    0.0 if state.summary else speeds[run.name].seconds_left(state.step or 0)
    for run, state in zip(runs, found, strict=True)
  ]
  rows = [
    (str(run), str(state), human_duration(left) if left else ABSENT)
    for run, state, left in zip(runs, found, lefts, strict=True)
  ]
  lines = align(('run', 'state', 'time left'), rows, left=(0, 1))
  return '\n'.join([*lines, *map(_speed, speeds.items()), f'in all: {human_duration(sum(lefts))}'])


def _speed(measured: tuple[str, Speed]) -> str:
  name, speed = measured
  return (
    f'{name}: {speed.total_steps:,} steps of {1000 * speed.step:.3g} ms, an evaluation of {speed.evaluation:.3g} s '
    f'every {speed.evaluation_steps:,}, {speed.start:.3g} s to start (measured now)'
  )
