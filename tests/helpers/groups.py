"""Groups of processes that train together on this machine, and how their runs compare with a run of one process."""

import socket

import group
import jax
import numpy as np
import pytest
from forking import Forked
from running import QUICKSTART, saved_state, summary_of

from paranet_jax.display.metrics import read_metrics

# 1,437 training images in batches of 96 are 14 steps an epoch.
RUN = (
  QUICKSTART,
  '--config.name=PN1-d',
  '--config.model.layers_per_block=1',
  '--config.model.growth_rate=2',
  '--config.model.image_side=8',
  '--config.data.held_out=0',
  '--config.train.batch_size=96',
  '--config.train.epochs=40',
  '--config.log.every_steps=1',
)
THREE = (*RUN, '--config.train.max_steps=3')
LONGER = (*RUN, '--config.train.max_steps=40')
"""Two seconds of slow steps: jax looks for a signal once a second."""


def start(processes, devices, *trainings):
  """Starts the processes of a group (see group.py); PROCESS in a flag becomes the index of the process."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  place = f'--coordinator=localhost:{port}', f'--num_processes={processes}', '--process_id=PROCESS'
  trainings = [[*trainings[0], *place], *trainings[1:]]
  return [
    Forked(group.main, devices, [[flag.replace('PROCESS', str(index)) for flag in own] for own in trainings])
    for index in range(processes)
  ]


def read_until(process, *beginnings):
  """Reads the output of a process up to a line with each of these beginnings in turn; returns it all."""
  lines = []
  for beginning in beginnings:
    for line in process.out:
      lines.append(line)
      if line.startswith(beginning):
        break
    else:
      raise AssertionError(f'no line begins with {beginning!r} in {"".join(lines)}{process.err.read()}')
  return ''.join(lines)


def ended(processes):
  """Exit codes, remaining outputs and errors of processes, which must not hang."""
  return zip(*[process.ended() for process in processes], strict=True)


def is_gone(process, index, count):
  """The line that reports a dead process."""
  return (
    f'error: process {index} of {count} (host {socket.gethostname()}, pid {process.pid}) is gone, and so all end; '
    'start all of them again: the run resumes from its last checkpoint'
  )


def train_alone(workdir):
  """Trains THREE in this process, on one device."""
  group.train([*THREE, '--config.train.devices=1', f'--workdir={workdir}'])


def train_and_stop(folder, *others):
  """Two processes with two devices each train `memory`, others, `whole` and `stopped`, which a signal to one stops."""
  processes = start(
    *(2, 2),
    [*THREE, f'--workdir={folder}/memory'],
    [*THREE, f'--workdir={folder}/refused', '--config.seed=PROCESS', '--refused'],
    *others,
    [*LONGER, f'--workdir={folder}/whole'],
    [*LONGER, f'--workdir={folder}/stopped', '--slow'],
  )
  out = read_until(processes[0], f'workdir: {folder}/stopped', 'epoch')
  refused = 'found a difference between process 1 and process 0 in seed (here 0); start all of them with the same'
  assert f'all processes must train the same, {refused} flags and data\n' in out
  assert not (folder / 'refused').exists()
  assert '3 steps of 96 on 4 x cpu in 2 processes\n' in out and 'Gloo' not in out
  processes[1].terminate()
  codes, outs, errs = ended(processes)
  assert codes == (0, 0), errs
  *_, last = outs[0].splitlines()
  assert last.startswith('stopped by a preemption notice after step ') and last.endswith('; the same command resumes')
  assert outs[1] == '' and errs[0] == ''
  assert 1 < saved_state(folder / 'stopped').step < 40


def relative_difference(workdir, other):
  found, expected = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(saved_state(folder).params)])
                     for folder in (workdir, other))  # fmt: skip
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def measured(workdir):
  """Every line of the metrics without its speed, as (step, split, values)."""
  names = ('step', 'split', 'images_per_second')
  lines = read_metrics(workdir)
  return [(line['step'], line['split'], {k: v for k, v in line.items() if k not in names}) for line in lines]


def assert_alike(workdir, other, processes, devices):
  """Checks that a run of these processes, with so many devices each, equals a run of one, batch for batch."""
  shares = [np.load(workdir / f'batches_{index}.npy') for index in range(processes)]
  np.testing.assert_array_equal(np.concatenate(shares, axis=1), np.load(other / 'batches_0.npy'))
  assert len({share.shape for share in shares}) == 1
  assert 0 <= relative_difference(workdir, other) < 1e-5
  found, expected = measured(workdir), measured(other)
  assert [line[:2] for line in found] == [line[:2] for line in expected]
  for (*_, values), (*_, others) in zip(found, expected, strict=True):
    assert values == pytest.approx(others, rel=1e-5)
  assert [path.name for path in (workdir / 'checkpoints').iterdir()] == ['3']
  assert len(list((workdir / 'tensorboard').iterdir())) == 1
  assert summary_of(workdir)['device']['count'] == processes * devices
