"""Reading a run with its calibrated exits."""

import dataclasses
import functools
from pathlib import Path

from paranet_jax import config as config_lib
from paranet_jax.early.bundle_folder import FILES, is_bundle, read_bundle
from paranet_jax.early.exit_plan import (
  EXITS,
  FULL,
  CheckpointId,
  ExitPlan,
  calibrate_command,
  fingerprint,
  full_network_plan,
  load_plan,
  read_plan,
)
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError
from paranet_jax.runs.checkpoints import FOLDER, Checkpoints
from paranet_jax.runs.dataset_facts import DATASET
from paranet_jax.runs.trained import TrainedRun, read_run
from paranet_jax.targets import trained_exits
from paranet_jax.weights.hub import download_files, hub_place, is_hub

_CHECKPOINTS = (f'{FOLDER}/',)


@dataclasses.dataclass(frozen=True)
class LoadedRun(TrainedRun):
  """A run with what `calibrate` chose for it as `exits`; None: it is not calibrated."""

  exits: ExitPlan | None = None

  @functools.cached_property
  def plan(self) -> ExitPlan:
    """What it predicts by: `exits`, or the last trained exit for all images."""
    if self.exits:
      return self.exits
    macs = mac_costs(self.model, self.image_shape, self.trained).alone()
    return full_network_plan(self.checkpoint, self.trained, [int(each) for each in macs])

  @property
  def checkpoint(self) -> CheckpointId:
    """What distinguishes its checkpoint."""
    return CheckpointId(self.config.name, self.config.data.name, self.step, fingerprint(self.variables))

  @property
  def trained(self) -> tuple[int, ...]:
    """The numbers of its trained exits, 1-based."""
    return trained_exits(config_lib.targets(self.config))


def load(workdir: str | Path, step: int | None = None) -> LoadedRun:
  """Reads a run or a bundle; the data set is not needed.

  Args:
    workdir: of the run, the folder of a bundle, or a repository with either: hf:OWNER/NAME or hf:OWNER/NAME@REVISION.
    step: the checkpoint's; None: the one that exits.json was made for, or else the latest.

  Raises:
    UserError: there is no run, no bundle or no such checkpoint, or exits.json is damaged or belongs to another
      checkpoint; or the repository cannot be downloaded.
  """
  if is_hub(str(workdir)):
    workdir = download_files(hub_place(str(workdir), 'another place', folder=True), (*FILES, DATASET), _CHECKPOINTS)
  workdir = absolute(workdir)
  if is_bundle(workdir):
    run = LoadedRun(**vars(read_bundle(workdir)))
    if step not in (None, run.step):
      raise UserError(f'expected step {step} in {workdir}, found a bundle of step {run.step}; leave out the step')
    plan = load_plan(workdir, run.checkpoint, run.trained)
    return run if plan.policy == FULL else dataclasses.replace(run, exits=plan)
  calibrated = (workdir / EXITS).exists()

  def choose(checkpoints: Checkpoints) -> int:
    return _calibrated_step(workdir, checkpoints) if step is None and calibrated else checkpoints.choose(step)

  run = LoadedRun(**vars(read_run(workdir, choose, read_plan(workdir).dtype if calibrated else None)))
  return dataclasses.replace(run, exits=load_plan(workdir, run.checkpoint, run.trained)) if calibrated else run


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
