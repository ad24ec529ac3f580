"""What processes that train together do (see forking.py).

The images that every step gets, uint8 [steps, b, H, W, C] of a process's share of the batches, are saved in the workdir
as `batches_<process>.npy`. With the flag `--slow`, the steps of a training take 50 ms or more, so that a signal arrives
before its end. A training with the flag `--refused` must be refused, and process 0 prints the message.
"""

import time
from pathlib import Path

import jax
import numpy as np
import pytest
from running import PROGRAMS

from paranet_jax import devices as devices_lib
from paranet_jax.command_line import parse, place
from paranet_jax.data import stream  # noqa: F401 Imported once for all processes.
from paranet_jax.host.errors import UserError
from paranet_jax.host.processes import joined
from paranet_jax.train import train_and_evaluate


def recorded(run_on, batches, pause):
  """A `devices.run_on` whose steps pause for so many seconds and keep the images they get."""

  def recording_run_on(devices, make_step, images_axis):
    train_step = run_on(devices, make_step, images_axis)

    def step(state, totals, images, labels, order):
      time.sleep(pause)
      rows = np.asarray(order)
      rows = rows[..., int(state.step) % rows.shape[-2], :]
      images_ = np.asarray(images)
      if images_axis == 0 and len(devices) > 1:  # One share per device, in order.
        chosen = [share[row] for share, row in zip(images_, rows, strict=True)]
      else:
        chosen = images_[rows]
      batches.append(np.reshape(chosen, (-1, *images_.shape[-3:])))
      return train_step(state, totals, images, labels, order)

    return step

  return recording_run_on


def train(arguments):
  """Runs one training and records its batches."""
  pause = 0.05 if '--slow' in arguments else 0
  values, config = parse(['group', *(argument for argument in arguments if argument != '--slow')])
  batches, run_on = [], devices_lib.run_on
  devices_lib.run_on = recorded(run_on, batches, pause)
  try:
    train_and_evaluate(config, Path(values.workdir))
  finally:
    devices_lib.run_on = run_on
  np.save(Path(values.workdir) / f'batches_{jax.process_index()}.npy', np.stack(batches))


def main(devices, trainings):
  """Runs the trainings in turn on so many devices; the flags of the first one say which process this is."""
  jax.config.update('jax_num_cpu_devices', devices)
  values, _ = parse(['group', *trainings[0]])
  PROGRAMS.install(pytest.MonkeyPatch())
  with joined(place(values), values.heartbeat_timeout):
    for own in trainings:
      own = [argument for argument in own if not argument.startswith(('--coordinator', '--num_', '--process_'))]
      if '--refused' not in own:
        train(own)
        continue
      with pytest.raises(UserError) as error:
        train([argument for argument in own if argument != '--refused'])
      print(error.value, flush=True)
