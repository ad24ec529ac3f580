"""Saving and restoring the train state: the only file that knows orbax."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from paranet_jax.errors import UserError

FOLDER = 'checkpoints'
VARIABLES = ('params', 'batch_stats')
"""What evaluation needs of a state."""


class Checkpoints:
  """The checkpoints of a run in `workdir/checkpoints`, one folder a step. A context manager.

  Args:
    workdir: absolute.
    keep: latest checkpoints kept; None: all, and nothing is made or removed.
  """

  def __init__(self, workdir: Path, keep: int | None = None):
    self._folder = workdir / FOLDER
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
    self._manager = ocp.CheckpointManager(self._folder, options=options) if keep or self._folder.exists() else None

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *unused) -> None:
    if self._manager is not None:
      self._manager.close()

  def latest_step(self) -> int | None:
    """Step of the latest checkpoint."""
    return self._manager.latest_step() if self._manager is not None else None

  def choose(self, step: int | None = None) -> int:
    """The step asked for, or the latest.

    Raises:
      UserError: there is no such checkpoint.
    """
    steps = sorted(self._manager.all_steps()) if self._manager is not None else []
    if not steps:
      raise UserError(f'expected a checkpoint in {self._folder}, found none; train first, or set --workdir')
    if step is not None and step not in steps:
      raise UserError(f'no checkpoint of step {step} in {self._folder}, found {steps}; set --step')
    return steps[-1] if step is None else step

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Saves a state, in the background, and returns when it has been copied to the host.

    Args:
      step: steps done.
      state: a tree of arrays.
      meta: JSON values kept beside it.
    """
    # A real copy: the next step is given the state's buffers (donation), which on a CPU the host shares.
    host_state = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    meta = meta | {'shapes': _shapes(state)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(host_state), meta=ocp.args.JsonSave(meta))
    self._manager.save(step, args=args)

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Restores a state and its meta.

    Args:
      step: an existing one (see `choose`).
      like: a state of the same structure; each array goes where the one here lies.

    Raises:
      UserError: the checkpoint is damaged, of another architecture or optimiser, or of weights alone.
    """
    meta = self._read(step, meta=ocp.args.JsonRestore()).meta
    saved = meta.pop('shapes', {})
    self._check_whole(step, saved)
    self._check_shapes(step, saved, _shapes(like))
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return self._read(step, state=ocp.args.StandardRestore(abstract)).state, meta

  def read_variables(self, step: int) -> dict[str, Any]:
    """The parameters and running statistics of whatever model was saved, as trees of float32 NumPy arrays.

    Args:
      step: an existing one (see `choose`).

    Raises:
      UserError: the checkpoint is damaged.
    """
    state = self._read(step, state=ocp.args.StandardRestore()).state
    # What was packed is of half the precision.
    return jax.tree.map(partial(np.asarray, dtype=np.float32), {name: state.get(name) or {} for name in VARIABLES})

  def restore_variables(self, step: int, like: Any) -> Any:
    """Restores parameters and running statistics without the rest of the state, as NumPy arrays.

    Args:
      step: an existing one (see `choose`).
      like: {'params', 'batch_stats'}, a tree of the same structure.

    Raises:
      UserError: the checkpoint is damaged, or of another architecture.
    """
    meta = self._read(step, meta=ocp.args.JsonRestore()).meta
    saved = {path: shape for path, shape in meta['shapes'].items() if path.split('/')[0] in like}
    self._check_shapes(step, saved, _shapes(like))
    variables = self.read_variables(step)
    return {name: variables[name] for name in like}

  def _read(self, step: int, **items: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except (KeyError, ValueError, OSError) as error:
      raise UserError(
        f'checkpoint {self._folder / str(step)} is damaged ({type(error).__name__}); '
        'move that folder away to go on from the one before it'
      ) from error

  def _check_whole(self, step: int, saved: dict[str, list[int]]) -> None:
    if all(path.split('/')[0] in VARIABLES for path in saved):
      raise UserError(
        f'checkpoint {self._folder / str(step)} holds weights alone, which are not trained on; '
        'start another run from them with --config.init_from, and another --workdir'
      )

  def _check_shapes(self, step: int, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    for path in [*wanted, *saved]:
      if saved.get(path) != wanted.get(path):
        raise UserError(
          f'checkpoint {self._folder / str(step)} is of another architecture or optimizer: {path} is '
          f'{saved.get(path, "absent")} there and {wanted.get(path, "absent")} in this configuration; '
          'set --config to the one it was trained with, or --workdir'
        )


def _shapes(state: Any) -> dict[str, list[int]]:
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): list(leaf.shape) for path, leaf in leaves}
