"""A run read back in one line, without its data set."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from running import saved_state

import paranet_jax
from paranet_jax.costs import exit_costs
from paranet_jax.early.exit_plan import CheckpointId, fingerprint, full_network_plan, save_plan
from paranet_jax.host.errors import UserError
from paranet_jax.runs.dataset_facts import DATASET


@pytest.fixture
def calibrated(finished_run, tmp_path):
  """A copy in which every sample exits at exit 2, calibrated for the first checkpoint, which is not the latest."""
  copy = shutil.copytree(finished_run, tmp_path / 'run')
  run = paranet_jax.load(copy, step=47)
  alone = [cost['macs_alone'] for cost in exit_costs(run.model, run.image_shape)][1:]
  checkpoint = CheckpointId(run.config.name, run.config.data.name, 47, fingerprint(run.variables))
  plan = full_network_plan(checkpoint, (2, 3), alone)
  every_sample = {'thresholds': (0.0, 0.0), 'confidence_thresholds': (0.0, 0.0)}
  plan = dataclasses.replace(plan, **every_sample, visited=(2, 3), macs=(alone[0], alone[1]))
  save_plan(copy, plan)
  return copy


def test_a_run_that_is_not_calibrated(finished_run):
  run = paranet_jax.load(str(finished_run))
  assert (run.step, run.exits, run.image_shape) == (140, None, (16, 16, 3))
  assert run.config.name == 'PN3-x3d' and run.dataset.class_names == tuple('0123456789')
  state = saved_state(finished_run)
  jax.tree.map(np.testing.assert_array_equal, run.variables, {'params': state.params, 'batch_stats': state.batch_stats})
  logits = run.model.apply(run.variables, np.zeros((2, 16, 16, 3), np.float32), exits=(3,))
  assert logits[2].shape == (2, 10)


def test_a_calibrated_run_is_its_own_checkpoint(calibrated):
  run = paranet_jax.load(calibrated)
  assert (run.step, run.exits.visited) == (47, (2, 3))
  early = paranet_jax.EarlyExit.load(calibrated)
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
  found = early.predict(images)
  normalized = (images / np.float32(255) - np.float32(run.dataset.mean)) / np.float32(run.dataset.std)
  logits = jax.jit(run.model.apply)(run.variables, normalized)[1]
  np.testing.assert_array_equal(found.exits, [2, 2, 2])
  np.testing.assert_array_equal(found.labels, np.argmax(logits, -1))
  np.testing.assert_array_equal(found.macs, [run.exits.macs[0]] * 3)
  assert early.class_names == run.dataset.class_names


def test_the_data_set_is_not_read(calibrated, monkeypatch):
  monkeypatch.setattr('paranet_jax.task.load_dataset', None)
  paranet_jax.EarlyExit.load(calibrated)


def test_exits_of_another_checkpoint(calibrated):
  with pytest.raises(UserError, match='belongs to another checkpoint: step 47 there, 140 here; .* --step=47'):
    paranet_jax.load(calibrated, step=140)


def test_a_run_without_exits_does_not_predict(finished_run):
  with pytest.raises(UserError) as error:
    paranet_jax.EarlyExit.load(finished_run)
  command = f'python -m paranet_jax.calibrate --workdir={finished_run} --threshold=0.9'
  assert str(error.value) == f'expected {finished_run}/exits.json, found none; {command} writes it'


def test_a_run_without_the_facts_of_its_data_set(calibrated):
  (calibrated / DATASET).unlink()
  with pytest.raises(UserError, match=r'expected .*dataset\.json, found none; python -m paranet_jax.calibrate'):
    paranet_jax.load(calibrated)


def test_a_checkpoint_of_another_architecture(finished_run, tmp_path):
  copy = shutil.copytree(finished_run, tmp_path / 'run')
  text = (copy / 'config.json').read_text()
  (copy / 'config.json').write_text(text.replace('"growth_rate": 4', '"growth_rate": 5'))
  with pytest.raises(UserError, match='has a different architecture or optimizer: batch_stats/'):
    paranet_jax.load(copy)


def test_a_calibrated_checkpoint_that_is_gone(calibrated):
  shutil.rmtree(calibrated / 'checkpoints' / '47')
  command = f'python -m paranet_jax.calibrate --workdir={calibrated} --threshold=0.9'
  with pytest.raises(UserError) as error:
    paranet_jax.load(calibrated)
  assert str(error.value) == (
    f'{calibrated}/exits.json belongs to the checkpoint of step 47, which is gone; {command} writes it again'
  )
  shutil.rmtree(calibrated / 'checkpoints' / '140')
  with pytest.raises(UserError, match='expected a checkpoint in .*, found none; train first'):
    paranet_jax.load(calibrated)


def test_an_unknown_home_folder():
  with pytest.raises(UserError, match=r'expected a run with a config\.json in .*/~nobody-here/run, found none'):
    paranet_jax.load('~nobody-here/run')


def test_exits_that_were_not_trained(calibrated):
  path = calibrated / 'exits.json'
  path.write_text(path.read_text().replace('"exits": [\n    2,', '"exits": [\n    1,').replace('    2,\n', '    1,\n'))
  with pytest.raises(UserError, match=r'exits must be the exits that were trained, \[2, 3\], found \[1, 3\]'):
    paranet_jax.load(calibrated)


def test_public_names():
  assert paranet_jax.EarlyExit.__module__ == 'paranet_jax.early.runtime'
  with pytest.raises(AttributeError, match="module 'paranet_jax' has no attribute 'lod'"):
    _ = paranet_jax.lod
