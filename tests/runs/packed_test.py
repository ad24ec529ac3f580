"""A run to share: half the precision, no state to train on, a run to all that reads one."""

import json
import shutil

import jax
import numpy as np
import pytest
from running import TINY, contents, refusal, run_main, saved_state

import paranet_jax
from paranet_jax.base_config import base_config
from paranet_jax.calibrate import __main__ as calibrate
from paranet_jax.pack import main
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.packed import pack
from paranet_jax.runs.workdir import restore_config

STEPS = '--config.train.max_steps=2', '--config.checkpoint.every_steps=1', '--config.data.held_out=300'


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  data = f'--config.data.data_dir={tmp_path_factory.mktemp("mine")}'
  assert run_main(*TINY, *STEPS, data, f'--workdir={folder}').code == 0
  return folder


@pytest.fixture(scope='module')
def packed(workdir, tmp_path_factory):
  out = tmp_path_factory.mktemp('packed') / 'new' / 'run'
  assert pack(workdir, out) == 2
  return out


def test_what_it_learned_is_rounded_once(workdir, packed):
  state, run = saved_state(workdir), paranet_jax.load(packed)
  wanted = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), state.params)
  jax.tree.map(np.testing.assert_array_equal, run.variables['params'], wanted)
  jax.tree.map(np.testing.assert_array_equal, run.variables['batch_stats'], state.batch_stats)
  assert {leaf.dtype for leaf in jax.tree.leaves(run.variables)} == {np.dtype(np.float32)}


def test_what_is_in_it(workdir, packed):
  for name in ('summary.json', 'metrics.jsonl', 'dataset.json'):
    assert (packed / name).read_bytes() == (workdir / name).read_bytes()
  assert sorted(path.name for path in packed.iterdir()) == sorted(
    ['checkpoints', 'config.json', 'dataset.json', 'metrics.jsonl', 'summary.json']
  )
  size = {
    folder: sum(len(data or b'') for data in contents(folder / 'checkpoints').values()) for folder in (workdir, packed)
  }
  assert size[packed] < size[workdir] / 2


def test_where_it_was_made_is_not_told(workdir, packed):
  for path in packed.rglob('*'):
    if path.is_file():
      assert not any(str(folder).encode() in path.read_bytes() for folder in (workdir, packed)), path


def test_where_the_data_lies_is_not_told(workdir, packed):
  assert 'mine' in (workdir / 'config.json').read_text()
  assert 'data_dir' not in (packed / 'config.json').read_text()
  assert restore_config(packed).data.data_dir == base_config().data.data_dir


def test_it_is_evaluated_calibrated_and_predicts(packed, tmp_path, capsys):
  copy = shutil.copytree(packed, tmp_path / 'copy')
  found = json.loads(run_main(f'--workdir={copy}', '--mode=eval', '--json').out)
  summary = json.loads((packed / 'summary.json').read_text())
  trained = [(row['nll'], there['nll']) for row, there in zip(found['splits']['test'], summary['exits'], strict=True)]
  assert all(here == pytest.approx(there, rel=2e-2) for here, there in trained if there is not None)
  assert calibrate.main([f'--workdir={copy}', '--threshold=0.5']) == 0, capsys.readouterr().err
  labels = paranet_jax.EarlyExit.load(copy).predict(np.zeros((2, 16, 16, 3), np.uint8)).labels
  assert labels.shape == (2,)


def test_it_is_not_trained_on_but_another_run_starts_from_it(packed, tmp_path):
  before = contents(packed)
  message = refusal(f'--workdir={packed}', '--config.train.max_steps=3', '--accept_config_changes', started=True)
  assert message == (
    f'checkpoint {packed}/checkpoints/2 holds weights only, which cannot be trained further; '
    'start another run from them with --config.init_from, and another --workdir'
  )
  assert contents(packed) == before
  code, out, _ = run_main(*TINY, *STEPS, f'--config.init_from={packed}', f'--workdir={tmp_path}')
  assert code == 0 and f'backbone from {packed} at step 2, new exits' in out


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--out=o'], 'the following arguments are required: --workdir; see --help'),
    (['--workdir=w'], 'the following arguments are required: --out; see --help'),
    (['--workdir=w', '--out=o', '--step=x'], "argument --step: invalid int value: 'x'; see --help"),
    (
      ['--workdir={run}', '--out={here}'],
      'expected {here} to be missing or an empty folder, found something there; set --out',
    ),
    (
      ['--workdir={run}', '--out={here}/file'],
      'expected {here}/file to be missing or an empty folder, found something there; ',
    ),
    (['--workdir={run}', '--out={here}/file/x'], 'workdir {here}/file/x must be a folder, found a file; '),
    (['--workdir={run}', '--out={here}/x', '--step=5'], 'no checkpoint of step 5 in {run}/checkpoints, found [1, 2]; '),
    (['--workdir={here}', '--out={here}/x'], 'expected a run with a config.json in {here}, found none; set --workdir'),
    (
      ['--workdir={stopped}', '--out={here}/x'],
      'expected a finished run, and {stopped} has no summary.json; train it to its end first',
    ),
  ],
)
def test_refusals(workdir, tmp_path, capsys, arguments, message):
  (tmp_path / 'file').write_text('mine')
  stopped = shutil.copytree(workdir, tmp_path / 'stopped')
  (stopped / 'summary.json').unlink()
  before = contents(tmp_path)
  places = {'run': workdir, 'here': tmp_path, 'stopped': stopped}
  assert main([argument.format(**places) for argument in arguments]) == 2
  out, err = capsys.readouterr()
  assert not out and err.startswith(f'error: {message.format(**places)}') and err.count('\n') == 1
  assert contents(tmp_path) == before


def test_too_large_for_half_the_precision(workdir, tmp_path, capsys):
  copy = shutil.copytree(workdir, tmp_path / 'run')
  shutil.rmtree(copy / 'checkpoints')
  state = {'params': {'kernel': np.float32([1, 7e4])}, 'batch_stats': {}}
  with Checkpoints(copy, keep=1) as checkpoints:
    checkpoints.save(1, state, {})
  assert main([f'--workdir={copy}', f'--out={tmp_path}/x']) == 2
  assert 'expected parameters of at most 65,504, as float16 holds, found larger; set --step' in capsys.readouterr().err
  assert not (tmp_path / 'x').exists()
