"""Fine-tuning: a new run's body taken from a finished one, its exits new."""

from pathlib import Path
from typing import Any

import jax

from paranet_jax.host.errors import UserError
from paranet_jax.runs.checkpoints import FOLDER, Checkpoints
from paranet_jax.runs.workdir import CONFIG, SUMMARY
from paranet_jax.steps import TrainState

EXIT = 'exit'
"""How the modules of an exit are called in every model, and none of the body."""


def take_body(state: TrainState, run: Path) -> TrainState:
  """A fresh state with the parameters and running statistics of a finished run, all but the exits' own.

  The exits are new even for as many classes. Images are normalized with the new data set's own mean and deviation, so
  that the body reads inputs of mean 0 and deviation 1, as it did.

  Args:
    state: at step 0.
    run: absolute folder.

  Raises:
    UserError: there is no finished run in the folder, or its body is of another architecture.
  """
  for name in (CONFIG, SUMMARY, FOLDER):
    if not (run / name).exists():
      raise UserError(
        f'init_from must be the folder of a finished run, with its {name}, and {run} has none; set --config.init_from'
      )
  with Checkpoints(run) as checkpoints:
    step = checkpoints.choose()
    saved = _body(checkpoints.read_variables(step))
  fresh = {'params': state.params, 'batch_stats': state.batch_stats}
  _check_same_shapes(run, saved, _body(fresh))
  print(f'body of {run} after step {step}, exits new', flush=True)
  taken = jax.tree_util.tree_map_with_path(lambda path, leaf: saved.get(_name(path), leaf), fresh)
  return state.replace(**taken)


def _body(variables: Any) -> dict[str, Any]:
  """The variables that are not an exit's, by their path."""
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  return {_name(path): leaf for path, leaf in leaves if not path[1].key.startswith(EXIT)}


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _check_same_shapes(run: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
  for name in [*wanted, *saved]:
    there, here = (list(body[name].shape) if name in body else 'absent' for body in (saved, wanted))
    if there != here:
      raise UserError(
        f'the body of init_from {run} does not fit: {name} is {there} there and {here} in this configuration; '
        f'set --config to the network of {run / CONFIG}, or --config.init_from'
      )
