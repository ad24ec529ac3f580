"""The walker of `portable.run` over jitted stages.

Each stage is one jitted function for a few fixed batch sizes, with the variables as constants. After a stage the
samples that exit are dropped and the rest are packed into fixed sizes again, so nothing recompiles after `warm_up`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paranet_jax.data.augment import normalize
from paranet_jax.data.scaling import scaling_of
from paranet_jax.early.chunks import FixedSizes, Sizes, default_sizes
from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.host import machine
from paranet_jax.host.kept_programs import Kept, digest
from paranet_jax.portable.run import TO_SIDE, Adaptive, Carried, Prediction, Predictions, Scaling, Stage

__all__ = ['EarlyExit', 'Prediction', 'Predictions']


class EarlyExit(Adaptive):
  """Predicts with a model that may answer early. Safe to share between threads.

  Attributes:
    plan: what `calibrate` chose; `with_threshold`, `with_thresholds` and `with_budget` depart from it.
  """

  def __init__(
    self,
    model: Any,
    variables: Any,
    plan: ExitPlan,
    image_shape: tuple[int, int, int],
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    class_names: Sequence[str] = (),
    sizes: Sizes | None = None,
    scaling: Scaling = TO_SIDE,
  ):
    """
    Args:
      model: with the multi-exit interface.
      variables: its parameters and running statistics.
      plan: of exits.json, or `exit_plan.full_network_plan`.
      image_shape: (H, W, C).
      mean, std: that normalize uint8 images, in units of 0..1 pixel values.
      class_names: one per class; empty if not known.
      sizes: batch sizes to compile for; None: what suits the device.
      scaling: how images are to be scaled, for those who decode them.
    """
    self.plan = plan
    self._model = model
    # Through the host: arrays committed to a device would compile once for its results and once for NumPy arrays.
    self._host_variables = jax.device_get(variables)
    self._traces: list[None] = []
    take = jax.jit(self._traced(lambda tree, rows: jax.tree.map(lambda leaf: leaf[rows], tree)))
    stages = {number: self._jitted(number, tuple(mean), tuple(std)) for number in plan.exits}
    packing = FixedSizes(sizes or default_sizes(), take)
    # Each traces the model: once for all copies with other thresholds or another plan.
    self._count_classes, macs = functools.cache(self._classes_of_an_exit), functools.cache(self._macs_in_turn)
    super().__init__(vars(plan), stages, stages, macs, image_shape, mean, std, class_names, packing, scaling)

  @classmethod
  def load(cls, workdir: str | Path, step: int | None = None) -> EarlyExit:
    """The runtime of a run, whose data set is not needed. One that is not calibrated answers at its last exit.

    Compiled programs are kept for the next start (see `machine.keep_programs`).

    Args:
      workdir: of the run.
      step: of the checkpoint; None: the one that exits.json was made for, or else the latest.

    Raises:
      UserError: there is no run, or its exits.json is damaged or belongs to another checkpoint.
    """
    from paranet_jax.early.loaded_run import load  # Orbax takes seconds to import.

    machine.keep_programs()
    run = load(workdir, step)
    facts = run.dataset
    scaling = scaling_of(run.config.data)
    return cls(
      run.model, run.variables, run.plan, run.image_shape, facts.mean, facts.std, facts.class_names, scaling=scaling
    )

  @property
  def num_traces(self) -> int:
    """Programs traced so far; it does not change after `warm_up`."""
    return len(self._traces)

  def with_plan(self, plan: ExitPlan) -> EarlyExit:
    """The same network with another plan, sharing what is compiled.

    Args:
      plan: for the same usable exits.

    Raises:
      ValueError: its exits differ.
    """
    if plan.exits != self.plan.exits:
      raise ValueError(f'expected a plan of the exits {self.plan.exits}, found {plan.exits}')
    other = copy.copy(self)
    other.plan = plan
    other._set_plan(vars(plan))
    return other

  def warm_up(self, dtype: Any = np.uint8, batches: bool = True) -> None:
    """Compiles what predicting needs, so that the first answer is not the slowest.

    Args:
      dtype: of the images.
      batches: for `predict` too, not only for `predict_one` and `anytime`.
    """
    _ = self._num_classes, self._all_macs
    super().warm_up(dtype, batches)

  @functools.cached_property  # Kept programs hold them already.
  def _variables(self) -> Any:
    return jax.device_put(self._host_variables)

  @functools.cached_property
  def _digest(self) -> str:
    return digest((self._model, self._host_variables))

  @functools.cached_property
  def _num_classes(self) -> int:
    return len(self.class_names) or self._count_classes()  # Tracing the model takes half a second.

  def _classes_of_an_exit(self) -> int:
    image = jax.ShapeDtypeStruct((1, *self.image_shape), np.float32)
    number = self.exits[-1]
    apply = functools.partial(self._model.apply, exits=(number,))
    return jax.eval_shape(apply, self._variables, image)[number - 1].shape[-1]

  def _macs_in_turn(self) -> list[int]:
    if self.plan.visited == self.plan.exits:  # They are in the plan. Counting traces the network several times.
      return [int(macs) for macs in self.plan.macs if macs is not None]
    every = tuple(range(len(self.exits)))
    return [int(macs) for macs in mac_costs(self._model, self.image_shape, self.exits).cumulative(every)]

  def _checked(self, images: np.ndarray, rank: int) -> np.ndarray:
    # NumPy does not know that bfloat16 is floating point.
    is_float = jnp.issubdtype(images.dtype, jnp.floating)
    return super()._checked(images.astype(np.float32, copy=False) if is_float else images, rank)

  def _inputs(self, images: np.ndarray) -> Carried:
    return {'images': images, 'carry': {}}  # The stages normalize: uint8 takes a quarter of the time to transfer.

  def _jitted(self, number: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Stage:
    @jax.jit
    @self._traced
    def run(images, carry):
      images = normalize(images, mean, std) if images.dtype == np.uint8 else images
      return self._model.apply(self._variables, images, carry, number, method='stage')

    def traceable() -> jax.stages.Wrapped:
      _ = self._variables  # On the device before tracing begins.
      return run

    programs: dict[tuple, Kept] = {}

    def stage(carried: Carried) -> tuple[Carried, Any]:
      images = carried['images']
      program = programs.get((images.shape, images.dtype))  # The carry's shapes follow from theirs.
      if program is None:
        kept = Kept(f'stage_{number}', traceable, lambda: (self._digest, number, mean, std))
        program = programs.setdefault((images.shape, images.dtype), kept)
      logits, carry = program(images, carried['carry'])
      return {'images': images, 'carry': carry}, logits

    return stage

  def _traced(self, function: Callable) -> Callable:
    @functools.wraps(function)
    def counted(*args):
      self._traces.append(None)  # Atomic, so that threads need no lock.
      return function(*args)

    return counted
