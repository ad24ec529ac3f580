"""Where arrays lie and how the one training step runs on one device or on several."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paranet_jax.errors import UserError
from paranet_jax.steps import AXIS


def pick_devices(count: int) -> list[jax.Device]:
  """The first `count` devices of this machine; 0: all.

  Raises:
    UserError: there are fewer.
  """
  devices = jax.local_devices()
  if count > len(devices):
    raise UserError(f'train.devices asks for {count} devices and {len(devices)} are here; set --config.train.devices')
  return devices[: count or len(devices)]


def replicated(devices: list[jax.Device]) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(_mesh(devices), PartitionSpec())


def shared(devices: list[jax.Device]) -> NamedSharding:
  """Split along the first axis, a part for each device."""
  return NamedSharding(_mesh(devices), PartitionSpec(AXIS))


def place_order(order: jax.Array, devices: list[jax.Device]) -> jax.Array:
  """An epoch's order int32 [steps, B] for the step: as it is, or [devices, steps, B / devices] with a device each."""
  if len(devices) == 1:
    return jax.device_put(order, replicated(devices))
  steps, batch_size = order.shape
  shares = np.asarray(order).reshape(steps, len(devices), batch_size // len(devices)).swapaxes(0, 1)
  return jax.device_put(shares, shared(devices))


def run_on(
  devices: list[jax.Device], make_step: Callable[[str | None], Callable], images_axis: int | None = None
) -> Callable[..., Any]:
  """The training step for these devices: jitted for one, pmapped for several, its state and totals donated.

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
  return Mesh(np.array(devices), (AXIS,))
