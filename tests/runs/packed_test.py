"""A run to share: half the precision, no state to train on, a run to all that reads one."""

import json
import shutil

import jax
import numpy as np
import pytest
from running import TINY, contents, refusal, run_main, saved_state

import paranet_jax
from paranet_jax import train
from paranet_jax.base_config import base_config
from paranet_jax.calibrate import __main__ as calibrate
from paranet_jax.pack import main
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.packed import pack
from paranet_jax.runs.workdir import restore_config


@pytest.fixture(scope='module')
def workdir(finished_run, tmp_path_factory):
  folder = shutil.copytree(finished_run, tmp_path_factory.mktemp('run') / 'run')
  config = json.loads((folder / 'config.json').read_text())
  config['data']['data_dir'] = '/data/mine'
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


@pytest.fixture(scope='module')
def packed(workdir, tmp_path_factory):
  out = tmp_path_factory.mktemp('packed') / 'new' / 'run'
  assert pack(workdir, out) == 140
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


@pytest.mark.parametrize('measured', [True, False])
def test_an_earlier_step_is_told_with_its_own_measures(workdir, tmp_path, measured):
  run, out = shutil.copytree(workdir, tmp_path / 'run'), tmp_path / 'out'
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  if measured:
    lines.insert(1, json.dumps({'step': 47, 'epoch': 1.0, 'split': 'test', 'exit_2/accuracy': 0.25, 'exit_3/nll': 1.5}))
    (run / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  (run / 'confusion.npz').write_bytes(b'of the last step')
  assert pack(run, out, 47) == 47
  summary, before = (json.loads((folder / 'summary.json').read_text()) for folder in (out, run))
  assert (summary['steps'], before['steps']) == (47, 140)
  assert [row['accuracy'] for row in summary['exits']] == [None, 0.25 if measured else None, None]
  assert [row['nll'] for row in summary['exits']] == [None, None, 1.5 if measured else None]
  assert {row[name] for row in summary['exits'] for name in ('loss', 'top5')} == {None}
  assert {row['accuracy'] for row in summary['held_out']} == {None}
  assert [row['macs'] for row in summary['exits']] == [row['macs'] for row in before['exits']]
  kept = [json.loads(line)['step'] for line in (out / 'metrics.jsonl').read_text().splitlines()]
  assert kept == [json.loads(line)['step'] for line in lines if json.loads(line)['step'] <= 47]
  assert not (out / 'confusion.npz').exists()


def test_where_it_was_made_is_not_told(workdir, packed):
  for path in packed.rglob('*'):
    if path.is_file():
      assert not any(str(folder).encode() in path.read_bytes() for folder in (workdir, packed.parent)), path


def test_where_the_data_lies_is_not_told(workdir, packed):
  assert 'mine' in (workdir / 'config.json').read_text()
  assert 'data_dir' not in (packed / 'config.json').read_text()
  assert restore_config(packed).data.data_dir == base_config().data.data_dir


def test_where_other_runs_lie_is_not_told(workdir, tmp_path):
  run = shutil.copytree(workdir, tmp_path / 'mine')
  config = json.loads((run / 'config.json').read_text())
  config['init_from'] = f'{tmp_path}/mine/start'
  config['loss'] |= {'distill': 'all', 'teacher': 'run', 'teacher_run': f'{tmp_path}/mine/teacher'}
  (run / 'config.json').write_text(json.dumps(config))
  pack(run, tmp_path / 'packed')
  for path in (tmp_path / 'packed').rglob('*'):
    assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
  config = restore_config(tmp_path / 'packed')
  assert (config.init_from, config.loss.teacher_run) == ('start', 'teacher')


def test_it_is_evaluated_calibrated_and_predicts(packed, tmp_path, capsys):
  copy = shutil.copytree(packed, tmp_path / 'copy')
  found = json.loads(run_main(f'--workdir={copy}', '--mode=eval', '--json').out)
  summary = json.loads((packed / 'summary.json').read_text())
  for row, there in zip(found['splits']['test'][1:], summary['exits'][1:], strict=True):  # Exit 1 is not trained.
    assert row['nll'] == pytest.approx(there['nll'], rel=2e-2)
  assert calibrate.main([f'--workdir={copy}', '--threshold=0.5']) == 0, capsys.readouterr().err
  labels = paranet_jax.EarlyExit.load(copy).predict(np.zeros((2, 16, 16, 3), np.uint8)).labels
  assert labels.shape == (2,)


def test_it_is_not_trained_on_but_another_run_starts_from_it(packed, tmp_path, monkeypatch):
  before = contents(packed)
  message = refusal(f'--workdir={packed}', '--config.train.max_steps=141', '--accept_config_changes', started=True)
  assert message == (
    f'checkpoint {packed}/checkpoints/140 holds weights only, which cannot be trained further; '
    'start another run from them with --config.init_from, and another --workdir'
  )
  assert contents(packed) == before
  # A run without steps: stopped before the first.
  monkeypatch.setattr(train, 'train_loop', lambda records, state, *unused: (state, None))
  same = '--config.model.growth_rate=4', '--config.model.image_side=16'
  code, out, _ = run_main(*TINY, *same, f'--config.init_from={packed}', f'--workdir={tmp_path}')
  assert code == 0 and f'backbone from {packed} at step 140, new exits' in out


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
    (['--workdir={run}', '--out={here}/file/x'], 'out {here}/file/x must be a folder, found a file; set --out'),
    (
      ['--workdir={run}', '--out={here}/x', '--step=5'],
      'no checkpoint of step 5 in {run}/checkpoints, found [47, 140]; ',
    ),
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


@pytest.mark.parametrize('existing', [False, True])
@pytest.mark.parametrize('error', [OSError(28, 'No space left on device', 'summary.json'), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_nothing(workdir, tmp_path, monkeypatch, capsys, error, existing):
  out = tmp_path / 'out'
  if existing:
    out.mkdir()

  def fail(self, step, *unused):
    (self._folder / 'half').mkdir()
    raise error

  monkeypatch.setattr(Checkpoints, 'save', fail)
  code = main([f'--workdir={workdir}', f'--out={out}'])
  interrupted = isinstance(error, KeyboardInterrupt)
  assert code == (130 if interrupted else 2)
  assert capsys.readouterr().err == (
    'stopped at once\n'
    if interrupted
    else 'error: summary.json cannot be read or written (No space left on device); fix that, or name another path\n'
  )
  assert list(tmp_path.rglob('*')) == ([out] if existing else [])


@pytest.mark.parametrize('fails', [False, True])
def test_what_another_command_packs_meanwhile_stays(workdir, packed, tmp_path, monkeypatch, capsys, fails):
  """Until it is whole, nothing is in the folder, so that a kill leaves nothing that the same command would refuse."""
  out = tmp_path / 'out'

  def save(self, *given, then=Checkpoints.save):
    assert list(out.iterdir()) == []
    then(self, *given)
    shutil.copytree(packed, out, dirs_exist_ok=True)
    if fails:
      raise OSError(28, 'No space left on device', 'summary.json')

  monkeypatch.setattr(Checkpoints, 'save', save)
  assert main([f'--workdir={workdir}', f'--out={out}']) == 2
  found = 'No space left' if fails else f'expected {out} to be missing or an empty folder, found something there'
  assert found in capsys.readouterr().err
  assert contents(out) == contents(packed) and list(tmp_path.iterdir()) == [out]


def test_the_next_command_is_one_for_a_shell(workdir, tmp_path, capsys):
  assert main([f'--workdir={workdir}', f'--out={tmp_path}/a run']) == 0
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.endswith(f"python -m paranet_jax.calibrate --workdir='{tmp_path}/a run' --budget=...")
