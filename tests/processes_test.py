"""Several processes train as one: real processes on this machine, each with its own CPU devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import group
import jax
import numpy as np
import pytest
from running import QUICKSTART, saved_state, summary_of

from paranet_jax.metrics import read_metrics

TESTS = Path(__file__).resolve().parent

# 1,137 training images in batches of 100 are 11 steps an epoch.
RUN = (
  QUICKSTART,
  '--config.name=PN1-d',
  '--config.model.layers_per_block=1',
  '--config.model.growth_rate=2',
  '--config.model.image_side=8',
  '--config.train.batch_size=100',
  '--config.log.every_steps=1',
)
THREE = (*RUN, '--config.train.max_steps=3')
STREAMED = ('--config.data.streaming=True', '--config.data.workers=0')


def free_port():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]


def start(program, processes, devices, arguments_of):
  """Starts several processes of a program; arguments_of(place) are those of one, `place` the flags that say which."""
  port = free_port()
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'PYTHONPATH': str(TESTS.parent),
  }
  places = [
    (f'--coordinator=localhost:{port}', f'--num_processes={processes}', f'--process_id={index}')
    for index in range(processes)
  ]
  return [
    subprocess.Popen(
      [sys.executable, *program, *arguments_of(place)],
      cwd=TESTS.parent,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for place in places
  ]


def results(group_of):
  """Exit codes, outputs and errors; none may hang."""
  try:
    told = [process.communicate(timeout=240) for process in group_of]
  finally:
    for process in group_of:
      process.kill()
  return [process.returncode for process in group_of], [out for out, _ in told], [err for _, err in told]


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The folder of the run in one process, on one device."""
  workdir = tmp_path_factory.mktemp('alone')
  group.train([*THREE, '--config.train.devices=1', f'--workdir={workdir}'])
  return workdir


def relative_difference(workdir, other):
  found, expected = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(saved_state(folder).params)])
                     for folder in (workdir, other))  # fmt: skip
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def measured(workdir):
  """Every line of the metrics but for its speed, as (step, split, values)."""
  names = ('step', 'split', 'images_per_second')
  lines = read_metrics(workdir)
  return [(line['step'], line['split'], {k: v for k, v in line.items() if k not in names}) for line in lines]


def assert_alike(workdir, other, processes):
  """Whether a run of so many processes was, batch for batch, the other one, in one process."""
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
  assert summary_of(workdir)['device']['count'] == 4


@pytest.mark.parametrize('processes, devices', [(2, 2), (4, 1)])
def test_several_processes_are_one(tmp_path, alone, processes, devices):
  kinds = {'in memory': (), 'streamed': STREAMED}

  def arguments_of(place):
    own = [[*THREE, *kind, f'--workdir={tmp_path / name}'] for name, kind in kinds.items()]
    return [json.dumps([[*own[0], *place], *own[1:]])]

  codes, outs, errs = results(start([str(TESTS / 'group.py')], processes, devices, arguments_of))
  assert (codes, errs) == ([0] * processes, [''] * processes)
  assert f'3 steps of 100 on 4 x cpu in {processes} processes\n' in outs[0] and 'Gloo' not in outs[0]
  assert outs[1:] == [''] * (processes - 1)
  for name in kinds:
    assert_alike(tmp_path / name, alone, processes)
