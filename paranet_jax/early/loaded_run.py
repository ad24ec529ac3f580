"""Reading a run with its calibrated exits."""

import dataclasses
from pathlib import Path

from paranet_jax import config as config_lib
from paranet_jax.early.exit_plan import (
  EXITS,
  CheckpointId,
  ExitPlan,
  calibrate_command,
  fingerprint,
  load_plan,
  read_plan,
)
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.trained import TrainedRun, read_run
from paranet_jax.targets import trained_exits


@dataclasses.dataclass(frozen=True)
class LoadedRun(TrainedRun):
  """A run with what `calibrate` chose for it as `exits`; None: it is not calibrated."""

  exits: ExitPlan | None = None


def load(workdir: str | Path, step: int | None = None) -> LoadedRun:
  """Reads a run; its data set is not needed.

  Args:
    workdir: of the run.
    step: the checkpoint's; None: the one that exits.json was made for, or else the latest.

  Raises:
    UserError: there is no run or no such checkpoint, or exits.json is damaged or belongs to another checkpoint.
  """
  workdir = absolute(workdir)
  calibrated = (workdir / EXITS).exists()

  def choose(checkpoints: Checkpoints) -> int:
    return _calibrated_step(workdir, checkpoints) if step is None and calibrated else checkpoints.choose(step)

  run = read_run(workdir, choose)
  plan = None
  if calibrated:
    checkpoint = CheckpointId(run.config.name, run.config.data.name, run.step, fingerprint(run.variables))
    plan = load_plan(workdir, checkpoint, trained_exits(config_lib.targets(run.config)))
  return LoadedRun(**vars(run), exits=plan)


def _calibrated_step(workdir: Path, checkpoints: Checkpoints) -> int:
  step = read_plan(workdir).step
  try:
    return checkpoints.choose(step)
  except UserError as error:
    checkpoints.choose()  # If there is none at all, this reports that instead.
    raise UserError(
      f'{workdir / EXITS} belongs to the checkpoint of step {step}, which is gone; '
      f'{calibrate_command(workdir)} writes it again'
    ) from error
