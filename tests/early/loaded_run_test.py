"""A run read back in one line, without its data set."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from running import saved_state

import paranet_jax
from paranet_jax.early.exit_plan import CheckpointId, fingerprint, full_network_plan, save_plan
from paranet_jax.host.errors import UserError
from paranet_jax.runs.dataset_facts import DATASET


@pytest.fixture(scope='module')
def checkpoint(finished_run):
  """The first checkpoint, which is not the latest."""
  run = paranet_jax.load(finished_run, step=47)
  return CheckpointId(run.config.name, run.config.data.name, 47, fingerprint(run.variables))


@pytest.fixture
def calibrated(finished_run, checkpoint, tmp_path):
  """A copy that is calibrated for the first checkpoint; every sample exits at exit 2."""
  copy = shutil.copytree(finished_run, tmp_path / 'run')
  at_once = {'thresholds': (0.0, 0.0), 'confidence_thresholds': (0.0, 0.0), 'visited': (2, 3), 'macs': (10, 30)}
  save_plan(copy, dataclasses.replace(full_network_plan(checkpoint, (2, 3), (10, 30)), **at_once))
  return copy


def test_a_run_that_is_not_calibrated(finished_run):
  run = paranet_jax.load(str(finished_run))
  assert (run.step, run.exits, run.image_shape) == (140, None, (16, 16, 3))
  assert run.config.name == 'PN3-x3d' and run.dataset.class_names == tuple('0123456789')
  state = saved_state(finished_run)
  jax.tree.map(np.testing.assert_array_equal, run.variables, {'params': state.params, 'batch_stats': state.batch_stats})
  logits = jax.eval_shape(lambda images: run.model.apply(run.variables, images, exits=(3,)), np.zeros((2, 16, 16, 3)))
  assert logits[2].shape == (2, 10)


def test_a_configuration_that_was_edited(finished_run, tmp_path):
  shutil.copyfile(finished_run / 'config.json', tmp_path / 'config.json')
  saved = json.loads((tmp_path / 'config.json').read_text())
  saved['train']['momentum'] = 2.0
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  with pytest.raises(UserError) as error:
    paranet_jax.load(tmp_path)
  assert str(error.value).startswith(f'{tmp_path}/config.json does not fit: train.momentum must be ')


def test_a_calibrated_run_loads_its_checkpoint_but_not_its_data_set(calibrated, monkeypatch):
  monkeypatch.setattr('paranet_jax.task.load_dataset', None)
  run = paranet_jax.load(calibrated)
  assert (run.step, run.exits.visited) == (47, (2, 3))
  early = paranet_jax.EarlyExit.load(calibrated)
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
  found = early.predict(images)
  normalized = (images / np.float32(255) - np.float32(run.dataset.mean)) / np.float32(run.dataset.std)
  logits = jax.jit(lambda images: run.model.apply(run.variables, images, exits=(2,)))(normalized)[1]
  np.testing.assert_array_equal(found.exits, [2, 2, 2])
  np.testing.assert_array_equal(found.labels, np.argmax(logits, -1))
  np.testing.assert_array_equal(found.macs, [10] * 3)
  assert early.class_names == run.dataset.class_names


def test_a_run_that_is_not_calibrated_answers_at_its_last_exit(finished_run, monkeypatch):
  monkeypatch.delenv('PARANET_DATA_DIR', raising=False)
  early = paranet_jax.EarlyExit.load(finished_run)
  run = paranet_jax.load(finished_run)
  assert run.exits is None and run.step == early.plan.step == 140
  plan = early.plan
  assert (plan.policy, plan.target, plan.exits, plan.visited) == ('full', {}, (2, 3), (3,))
  assert (plan.expected, plan.test, plan.splits, plan.provenance) == (None,) * 4
  assert plan.fingerprint == fingerprint(run.variables)
  images = np.random.default_rng(0).integers(0, 256, (3, *run.image_shape), np.uint8)
  found = early.predict(images)
  np.testing.assert_array_equal(found.exits, [3] * 3)
  np.testing.assert_array_equal(found.macs, [plan.macs_alone[1]] * 3)


def replace(path, *pairs):
  text = path.read_text()
  for old, new in pairs:
    text = text.replace(old, new)
  path.write_text(text)


@pytest.mark.parametrize(
  ('damage', 'step', 'message'),
  [
    (lambda run: None, 140, 'belongs to another checkpoint: step 47 there, 140 here; .* --step=47'),
    (
      lambda run: (run / DATASET).unlink(),
      None,
      r'expected .*dataset\.json, found none; python -m paranet_jax.calibrate',
    ),
    (
      lambda run: replace(run / 'config.json', ('"growth_rate": 4', '"growth_rate": 5')),
      None,
      'has a different architecture or optimizer: batch_stats/',
    ),
    (
      lambda run: replace(run / 'exits.json', ('[2, 3]', '[1, 3]')),
      None,
      r'exits must be the exits that were trained, \[2, 3\], found \[1, 3\]',
    ),
    (
      lambda run: shutil.rmtree(run / 'checkpoints/47'),
      None,
      r'run/exits\.json belongs to the checkpoint of step 47, which is gone; '
      r'python -m paranet_jax.calibrate --workdir=.*/run --threshold=0\.9 writes it again$',
    ),
    (
      lambda run: [shutil.rmtree(run / 'checkpoints' / step) for step in ('47', '140')],
      None,
      'expected a checkpoint in .*, found none; train first',
    ),
  ],
)
def test_what_cannot_be_loaded(calibrated, damage, step, message):
  damage(calibrated)
  with pytest.raises(UserError, match=message):
    paranet_jax.load(calibrated, step)


def test_an_unknown_home_folder():
  with pytest.raises(UserError, match='found ~nobody-here/run, whose home folder is unknown'):
    paranet_jax.load('~nobody-here/run')


def test_public_names():
  assert paranet_jax.EarlyExit.__module__ == 'paranet_jax.early.runtime'
  with pytest.raises(AttributeError, match="module 'paranet_jax' has no attribute 'lod'"):
    _ = paranet_jax.lod
