"""Tests of the dtype that a run computes in: chosen at its start by a forced timing, recorded, and kept."""

import json

import jax
import jax.numpy as jnp
import pytest
import tiny
from running import QUICKSTART, TINY, refusal, run_command

from paranet_jax import seeds, train
from paranet_jax.dtype_timing import Timing
from paranet_jax.host.errors import UserError
from paranet_jax.plan import __main__ as plan
from paranet_jax.runs import dtype as dtype_lib
from paranet_jax.runs.dtype import with_dtype, with_saved_dtype
from paranet_jax.runs.status import run_status
from paranet_jax.runs.trained import read_task
from paranet_jax.runs.workdir import changes, restore_config, save_config

SLOW, FAST = Timing('a product', 2.0, 3.456), Timing('a product', 2.0, 1.9)
ASKED = ('float32', 'bfloat16', 'bfloat16!')


def config(dtype, **fields):
  found = tiny.small('resnet', **fields)
  found.model.dtype, found.data.name = dtype, 'digits'
  return found


@pytest.fixture
def timed(monkeypatch):
  """Makes a timing the measured one; the list of what was measured."""
  asked = []

  def force(timing):
    def dtype_timing(model, image_shape, batch_size):
      asked.append((image_shape, batch_size))
      return timing

    monkeypatch.setattr(dtype_lib, 'dtype_timing', dtype_timing)
    monkeypatch.setattr('paranet_jax.dtype_timing.cpu_name', lambda: 'a CPU')
    return asked

  return force


@pytest.mark.parametrize(
  ('asked', 'timing', 'chosen', 'measured'),
  [
    ('float32', FAST, 'float32', 0),
    ('bfloat16', SLOW, 'float32', 1),
    ('bfloat16', FAST, 'bfloat16!', 1),
    ('bfloat16', None, 'bfloat16!', 1),
    ('bfloat16!', SLOW, 'bfloat16!', 0),
  ],
)
def test_a_new_run_computes_in_the_faster_dtype(capsys, timed, asked, timing, chosen, measured):
  found, given = timed(timing), config(asked)
  devices = jax.devices()[:1] * 4  # Each has a quarter of the batch of 64.
  assert with_dtype(given, devices).model.dtype == chosen and given.model.dtype == asked
  assert found == [((8, 8, 3), 16)] * measured
  line = (
    'model.dtype bfloat16 is slower here, so this run computes in float32: 3.46 ms in bfloat16, 2 ms in float32 for a '
    'product on a CPU; set bfloat16! to insist\n'
  )
  assert capsys.readouterr().out == (line if chosen != asked == 'bfloat16' and timing is SLOW else '')


def test_other_devices_are_not_measured(timed):
  class Accelerator:
    platform = 'tpu'

  found = timed(SLOW)
  assert with_dtype(config('bfloat16'), [Accelerator()]).model.dtype == 'bfloat16!' and not found


@pytest.mark.parametrize('saved', ASKED)
def test_a_run_goes_on_as_it_began(capsys, timed, tmp_path, saved):
  found = timed(SLOW if saved != 'float32' else FAST)  # As on another machine.
  save_config(tmp_path, config(saved))
  chosen = 'float32' if saved == 'float32' else 'bfloat16!'
  assert with_dtype(config('bfloat16'), jax.devices()[:1], tmp_path).model.dtype == chosen and not found
  line = f'model.dtype bfloat16: the run in {tmp_path} began in float32, and goes on so\n'
  assert capsys.readouterr().out == (line if saved == 'float32' else '')
  read = with_saved_dtype(config('bfloat16'), tmp_path).model.dtype
  assert read.removesuffix('!') == chosen.removesuffix('!')
  assert run_status(tmp_path, config('bfloat16')).changed == []  # As experiments and seeds ask.


@pytest.mark.parametrize('saved', ASKED)
@pytest.mark.parametrize('asked', ASKED)
def test_a_run_in_another_dtype_is_another_run(tmp_path, saved, asked):
  save_config(tmp_path, config(saved))
  same = asked == 'bfloat16' or (asked == 'float32') == (saved == 'float32')
  assert changes(tmp_path, config(asked)) == ([] if same else [f'model.dtype: {saved} -> {asked}'])


def test_a_folder_without_a_run_has_no_dtype(tmp_path):
  assert with_saved_dtype(config('bfloat16'), tmp_path).model.dtype == 'bfloat16'
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(UserError, match=r'config\.json'):
    with_dtype(config('bfloat16'), jax.devices()[:1], tmp_path)


class _Reached(Exception):
  pass


@pytest.mark.parametrize('number', [1, 2])
def test_training_chooses_before_it_builds_and_records(monkeypatch, timed, tmp_path, number):
  """Of several seeds, once for all."""
  found, given = timed(SLOW), config('bfloat16')
  given.seeds = number
  build, built = train.agreed_task, []

  def build_and_note(config, *rest):
    built.append(config.model.dtype)
    return build(config, *rest)

  def stop(*_):
    raise _Reached

  monkeypatch.setattr(train, 'agreed_task', build_and_note)
  monkeypatch.setattr(train, 'train_loop', stop)
  start = seeds.train_seeds if number > 1 else train.train_and_evaluate
  with pytest.raises(_Reached):
    start(given, tmp_path)
  assert built == ['float32'] and len(found) == 1
  assert json.loads((tmp_path / 'config.json').read_text())['model']['dtype'] == 'float32'
  with pytest.raises(_Reached):
    start(given, tmp_path)
  assert built == ['float32'] * 2 and len(found) == 1


def test_evaluating_computes_as_the_run_did(finished_run):
  given = restore_config(finished_run)
  given.model.dtype = 'bfloat16'
  task, _, _ = read_task(given, finished_run, None, jax.local_devices()[:1])
  assert task.model.dtype == jnp.float32 and task.config.model.dtype == 'float32'


def test_plan_says_so_apart_from_its_result(monkeypatch, timed):
  timed(SLOW)
  planned = []
  monkeypatch.setattr('paranet_jax.plan.plan.build_plan', lambda config, *_: planned.append(config.model.dtype))
  monkeypatch.setattr('paranet_jax.plan.plan_text.as_json', lambda _: {})
  code, out, err = run_command(plan.main, QUICKSTART, '--config.model.dtype=bfloat16', '--json')
  assert (code, out, planned) == (0, '{}\n', ['float32'])
  assert err.startswith('model.dtype bfloat16 is slower here') and err.count('\n') == 1


def test_an_unknown_dtype_names_all():
  assert 'model.dtype must be one of float32, bfloat16, bfloat16!, found half' in refusal(
    *TINY, '--config.model.dtype=half'
  )
