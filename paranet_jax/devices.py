"""Where arrays lie and how the one training step runs on one device or on several."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paranet_jax.host.errors import UserError
from paranet_jax.steps import AXIS


def pick_devices(count: int) -> list[jax.Device]:
  """The first `count` devices of all processes together, as many of each, one process after another; 0: all.

  Raises:
    UserError: there are fewer, or the processes cannot have as many each.
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


def of_this_process(devices: list[jax.Device]) -> list[jax.Device]:
  """Those of them that this process computes on."""
  if jax.process_count() == 1:
    return list(devices)
  return [device for device in devices if device.process_index == jax.process_index()]


def replicated(devices: list[jax.Device]) -> NamedSharding:
  """Whole on every device of this process."""
  return NamedSharding(_mesh(devices), PartitionSpec())


def shared(devices: list[jax.Device]) -> NamedSharding:
  """Split along the first axis, a part for each device of this process."""
  return NamedSharding(_mesh(devices), PartitionSpec(AXIS))


def place_order(order: jax.Array, devices: list[jax.Device]) -> jax.Array:
  """An epoch's order int32 [steps, B] for the step.

  Returns:
    As it is, or [devices of this process, steps, B / devices] with a device each: its share of every batch.
  """
  if len(devices) == 1:
    return jax.device_put(order, replicated(devices))
  steps, batch_size = order.shape
  shares = np.asarray(order).reshape(steps, len(devices), batch_size // len(devices)).swapaxes(0, 1)
  here = of_this_process(devices)
  first = devices.index(here[0])
  return jax.device_put(shares[first : first + len(here)], shared(devices))


def run_on(
  devices: list[jax.Device], make_step: Callable[[str | None], Callable], images_axis: int | None = None
) -> Callable[..., Any]:
  """The training step for these devices: jitted for one, pmapped for several, its state and totals donated.

  In several processes each is given, and returns, what lies on its own devices.

  Args:
    make_step: from the name of the device axis (None for one device) to the step's body.
    images_axis: None: every device is given all images and labels; 0: their first axis is of the devices.
  """
  if len(devices) == 1:
    return jax.jit(make_step(None), donate_argnums=(0, 1))
  # The state is passed whole (None), not stacked: every device holds and returns the same.
  in_axes = (None, None, images_axis, images_axis, 0)
  return jax.pmap(
    make_step(AXIS), axis_name=AXIS, in_axes=in_axes, out_axes=None, devices=devices, donate_argnums=(0, 1)
  )


def _mesh(devices: list[jax.Device]) -> Mesh:
  return Mesh(np.array(of_this_process(devices)), (AXIS,))
