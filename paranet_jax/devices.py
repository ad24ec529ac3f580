"""Where arrays are placed, and how one training step runs on one device or several, for one run or several."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax.host.errors import UserError
from paranet_jax.host.kept_programs import Kept
from paranet_jax.host.machine import Device, device_memory

AXIS = 'devices'


def pick_devices(count: int) -> list[Device]:
  """The first `count` devices over all processes, the same number from each, in the order of processes; 0: all.

  Raises:
    UserError: there are fewer, or the processes cannot have the same number each.
  """
  processes = jax.process_count()
  devices = [[device for device in jax.devices() if device.process_index == own] for own in range(processes)]
  fewest = min(map(len, devices))
  if count > fewest * processes:
    here = f'{fewest} are here' if processes == 1 else f'{processes} processes of {fewest} are here'
    raise UserError(f'train.devices asks for {count} devices and {here}; set --config.train.devices')
  if count % processes or (not count and max(map(len, devices)) > fewest):
    raise UserError(
      f'{processes} processes must have as many devices each, found {list(map(len, devices))} and train.devices '
      f'{count}; set --config.train.devices to a multiple of {processes}'
    )
  each = count // processes or fewest
  return [device for own in devices for device in own[:each]]


def check_fits(config: ConfigDict, devices: list[Device], training: bool = True) -> None:
  """Checks, before anything is read or traced, that the devices can share a batch and have the memory for a run.

  Raises:
    UserError: they cannot.
  """
  if training:
    config_lib.check_devices(config, len(devices))
  own = of_this_process(devices)[0]
  parts = jax.process_count() if own.platform == 'cpu' else len(devices)
  config_lib.check_memory(config, parts, device_memory(own), training)


def of_this_process(devices: list[Device]) -> list[Device]:
  """The devices among them that this process computes on."""
  if jax.process_count() == 1:
    return list(devices)
  return [device for device in devices if device.process_index == jax.process_index()]


def replicated(devices: list[Device]) -> NamedSharding:
  """A full copy on every device of this process."""
  return NamedSharding(_mesh(devices), PartitionSpec())


def shared(devices: list[Device]) -> NamedSharding:
  """Split along the first axis, one part per device of this process."""
  return NamedSharding(_mesh(devices), PartitionSpec(AXIS))


def one_or_shared(devices: list[Device]) -> NamedSharding:
  """On the device if there is one; otherwise split along the first axis."""
  return replicated(devices) if len(devices) == 1 else shared(devices)


def place_order(order: jax.Array | np.ndarray, devices: list[Device]) -> jax.Array:
  """Places an epoch's order, int32 [steps, B].

  Returns:
    On one device, the same; on several, [devices of this process, steps, B / devices]: each device's share of every
    batch.
  """
  if len(devices) == 1:
    return jax.device_put(order, replicated(devices))
  steps, batch_size = order.shape
  shares = np.asarray(order).reshape(steps, len(devices), batch_size // len(devices)).swapaxes(0, 1)
  here = of_this_process(devices)
  first = devices.index(here[0])
  return jax.device_put(shares[first : first + len(here)], shared(devices))


def run_on(
  devices: list[Device], make_step: Callable[[str | None], Callable], images_axis: int | None = None
) -> jax.stages.Wrapped:
  """The training step for these devices: jitted for one, pmapped for several, with state and totals donated.

  In a multi-process run, each process passes and gets the arrays on its own devices.

  Args:
    make_step: returns the step's body, given the name of the device axis (None for one device).
    images_axis: None: every device gets all images and labels; 0: their first axis is the devices.
  """
  if len(devices) == 1:
    return jax.jit(make_step(None), donate_argnums=(0, 1))
  # The state is passed unstacked (None): every device holds and returns the same.
  in_axes = (None, None, images_axis, images_axis, 0)
  return jax.pmap(
    make_step(AXIS), axis_name=AXIS, in_axes=in_axes, out_axes=None, devices=devices, donate_argnums=(0, 1)
  )


def _mesh(devices: list[Device]) -> Mesh:
  return Mesh(np.array(of_this_process(devices)), (AXIS,))


class Layout:
  """How runs lie on devices; here one run, with a replicated state and a share of every batch for each device."""

  def __init__(self, devices: list[Device]):
    self.devices = devices

  def compiled(
    self, make_step: Callable[[str | None], Callable], images_axis: int | None, determines: Any
  ) -> Callable[..., Any]:
    """The training step (see `run_on`).

    Args:
      determines: what tells its body from others, see `kept_programs.described`.
    """
    step = run_on(self.devices, make_step, images_axis)
    return Kept('train_step', lambda: step, lambda: determines) if len(self.devices) == 1 else step

  def join(self, trees: Sequence[Any]) -> Any:
    """Places the trees of all runs as one."""
    return jax.device_put(trees[0], replicated(self.devices))

  def order(self, orders: Sequence[jax.Array]) -> jax.Array:
    """Places the order of an epoch of all runs (see `place_order`)."""
    return place_order(orders[0], self.devices)

  def split(self, tree: Any) -> Iterator[Any]:
    """The tree of each run."""
    yield tree


class SideBySide(Layout):
  """The layout of several runs, the first axis of every array: one per device, or vmapped on a single device."""

  def compiled(
    self, make_step: Callable[[str | None], Callable], images_axis: int | None, determines: Any
  ) -> Callable[..., Any]:
    step, in_axes = make_step(None), (0, 0, images_axis, images_axis, 0)
    if len(self.devices) == 1:
      return jax.jit(jax.vmap(step, in_axes), donate_argnums=(0, 1))
    return jax.pmap(step, in_axes=in_axes, devices=self.devices, donate_argnums=(0, 1))

  def join(self, trees: Sequence[Any]) -> Any:
    host = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(trees))
    return jax.device_put(host, one_or_shared(self.devices))

  def order(self, orders: Sequence[jax.Array]) -> jax.Array:
    return self.join(orders)

  def split(self, tree: Any) -> Iterator[Any]:
    host = jax.device_get(tree)  # Evaluation runs on the first device.
    for run in range(len(jax.tree.leaves(host)[0])):
      yield jax.device_put(jax.tree.map(lambda leaf, run=run: leaf[run], host), self.devices[0])
