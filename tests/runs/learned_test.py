"""A run on images whose class folder is then renamed: every command that reads them again refuses it."""

import json
import shutil

import chex
import numpy as np
import pytest
from PIL import Image
from running import QUICKSTART, contents, refusal, run_command, run_main

from paranet_jax import task as task_lib
from paranet_jax.calibrate.__main__ import main as calibrate
from paranet_jax.config import with_data_dir
from paranet_jax.data.load import load_dataset
from paranet_jax.early.runtime import EarlyExit
from paranet_jax.ensemble.__main__ import main as ensemble
from paranet_jax.export.__main__ import main as export
from paranet_jax.runs.dataset_facts import restore_dataset_facts, save_weights_facts
from paranet_jax.runs.learned import IDENTITY, restore_learned
from paranet_jax.runs.packed import pack
from paranet_jax.runs.workdir import restore_config
from paranet_jax.steps import Preprocessing

RENAMED = "expected the 2 classes that the run in {run} learned, found 'apple' as class 1 of {photos}, which was 'cat'"


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A folder with a calibrated run, its `photos` and the command that trained it."""
  folder = tmp_path_factory.mktemp('trained')
  rng = np.random.default_rng(0)
  for name, color in (('cat', (220, 30, 30)), ('dog', (30, 30, 220))):
    (folder / 'photos' / name).mkdir(parents=True)
    for number in range(20):
      pixels = np.clip(np.array(color) + rng.integers(-20, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
      Image.fromarray(pixels).save(folder / f'photos/{name}/{number}.png')
  fields = {'name': 'PN1-d', 'model.layers_per_block': 1, 'model.growth_rate': 2, 'model.image_side': 8}
  fields |= {'train.batch_size': 4, 'train.max_steps': 2, 'train.devices': 1, 'data.held_out': 8}
  fields |= {'data.name': 'folder', 'data.data_dir': folder / 'photos'}
  command = (QUICKSTART, f'--workdir={folder}/run', *(f'--config.{name}={value}' for name, value in fields.items()))
  code, _, err = run_main(*command)
  assert (code, err) == (0, '')
  assert run_command(calibrate, f'--workdir={folder}/run', '--threshold=0.9').code == 0
  return folder, command


@pytest.fixture
def moved(trained, tmp_path):
  """A copy of the run and of its images, both in other folders, and the command."""
  run, photos = (shutil.copytree(trained[0] / name, tmp_path / name) for name in ('run', 'photos'))
  return run, photos, trained[1]


def test_what_is_recorded(trained):
  facts = json.loads((trained[0] / 'run/dataset.json').read_text())
  assert facts['class_names'] == ['cat', 'dog'] and facts['counts'] == {'train': 24, 'held_out': 8, 'test': 8}
  assert facts['fingerprints'].keys() == facts['counts'].keys()
  with np.load(trained[0] / 'run' / IDENTITY) as record:
    assert {name: len(record[f'{name}.ids']) for name in facts['counts']} == facts['counts']


def test_every_command_refuses_a_renamed_class(moved):
  run, photos, command = moved
  shutil.move(photos / 'dog', photos / 'apple')
  place, before = f'--data_dir={photos}', contents(run)
  message = RENAMED.format(run=run, photos=photos)
  where = f'--workdir={run}'
  assert refusal(*command, where, '--config.train.max_steps=3', '--accept_config_changes', place).startswith(message)
  assert refusal(where, '--mode=eval', place).startswith(message)
  for main, *arguments in (
    (calibrate, where, '--threshold=0.9', place),
    (export, where, f'--out={photos}/out', '--dtype=int8', '--data-dir', photos),
    (ensemble, run, run, place),
  ):
    code, _, err = run_command(main, *arguments)
    assert code == 2 and err.startswith(f'error: {message}') and err.count('\n') == 1, err
  assert contents(run) == before


def test_accepted_the_names_of_the_network_stay(moved):
  run, photos, command = moved
  facts = (run / 'dataset.json').read_bytes()
  evaluation = f'--workdir={run}', '--mode=eval', '--json'
  right = json.loads(run_main(*evaluation, f'--data_dir={photos}').out)['splits']
  shutil.move(photos / 'dog', photos / 'apple')
  accepted = f'--data_dir={photos}', '--accept_data_changes'
  found = json.loads(run_main(*evaluation, *accepted).out)['splits']
  chex.assert_trees_all_close(found, right, rtol=1e-6)
  assert run_command(calibrate, f'--workdir={run}', '--threshold=0.9', *accepted).code == 0
  assert run_main(*command, f'--workdir={run}', *accepted).code == 0
  assert (run / 'dataset.json').read_bytes() == facts


def test_images_that_moved(moved, monkeypatch):
  """The place alone is no change of the configuration, and a resumed run saves the new one."""
  monkeypatch.delenv('PARANET_DATA_DIR', raising=False)
  run, photos, command = moved
  gone = f'--config.data.data_dir={photos}/gone'
  said = refusal(*command, f'--workdir={run}', gone)
  assert 'set --workdir for a new run, --data_dir for the same images in another place, or --accept_config' in said
  assert run_main(*command, f'--workdir={run}', '--data-dir', photos)[::2] == (0, '')
  assert restore_config(run).data.data_dir == str(photos)
  elsewhere = shutil.move(photos, photos.with_name('elsewhere'))
  code, _, err = run_command(calibrate, f'--workdir={run}', '--threshold=0.9')
  assert code == 2 and err.endswith(f'found no folder {photos}: name it with --data_dir=...\n')
  assert run_command(calibrate, f'--workdir={run}', '--threshold=0.9', f'--data_dir={elsewhere}').code == 0
  monkeypatch.setenv('PARANET_DATA_DIR', str(elsewhere))
  assert run_command(calibrate, f'--workdir={run}', '--threshold=0.9')[::2] == (0, '')
  assert run_main(*command[:-1], f'--workdir={run}')[::2] == (0, '')  # The configuration's default, and moved.


def test_added_images_change_no_normalization(moved, monkeypatch, tmp_path):
  """Every command that reads the data again, and those that do not."""
  run, photos, command = moved
  place, where = f'--data_dir={photos}', f'--workdir={run}'
  facts = json.loads((run / 'dataset.json').read_text())
  recorded = tuple(facts['mean']), tuple(facts['std'])
  for number in range(10):
    Image.new('RGB', (8, 8), (250, 250, 200 + number)).save(photos / f'cat/bright {number}.png')
  data = with_data_dir(restore_config(run), photos).data
  fresh = load_dataset(data, image_side=8, channels=3)
  assert np.abs(np.subtract(fresh.mean, recorded[0])).max() > 0.05  # Of a new run.
  used = []

  def spy(mean, std, *rest):
    used.append((mean, std))
    return Preprocessing(mean, std, *rest)

  monkeypatch.setattr(task_lib, 'Preprocessing', spy)
  for main, *arguments in (
    (calibrate, where, '--threshold=0.9', place),
    (ensemble, run, run, place),
  ):
    assert run_command(main, *arguments).code == 0
  assert run_main(where, '--mode=eval', place).code == 0
  resumed = '--config.train.max_steps=3', '--accept_config_changes'
  assert run_main(*command, where, *resumed, place).code == 0
  assert len(used) == 4 and set(used) == {recorded}
  after = json.loads((run / 'dataset.json').read_text())
  assert (after['mean'], after['std']) == (facts['mean'], facts['std'])
  assert after['counts']['train'] > facts['counts']['train']  # The resumed run has learned from them.
  early_exit = EarlyExit.load(run)
  np.testing.assert_array_equal([early_exit._mean, early_exit._std], np.float32(recorded))
  assert run_command(export, where, f'--out={tmp_path}/out', '--format=stablehlo').code == 0
  preprocessing = json.loads((tmp_path / 'out/preprocessing.json').read_text())
  assert (preprocessing['mean'], preprocessing['std']) == (facts['mean'], facts['std'])


def test_a_normalization_that_comes_with_weights_stays(moved, monkeypatch):
  """As their classes do, whatever is trained on them afterwards."""
  run, photos, command = moved
  shutil.rmtree(run)
  run.mkdir()
  save_weights_facts(run, 'theirs', ['cat', 'dog'], [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
  assert restore_learned(run, 3).by_position is False
  assert run_main(*command, f'--workdir={run}', f'--data-dir={photos}')[::2] == (0, '')
  facts = restore_dataset_facts(run, 3)
  assert (facts.mean, facts.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
  assert facts.name == 'folder' and facts.counts == {'train': 24, 'held_out': 8, 'test': 8} and facts.fingerprints
  assert restore_learned(run, 3).mean == facts.mean


def test_a_class_that_is_only_trained_on_cannot_be_calibrated(moved, monkeypatch):
  run, photos, _ = moved
  with np.load(run / IDENTITY) as record:
    record = dict(record)
  dogs = record['held_out.labels'] == 1
  for name in ('ids', 'labels'):  # As if the held-out dogs had been trained on.
    record[f'train.{name}'] = np.concatenate([record[f'train.{name}'], record[f'held_out.{name}'][dogs]])
    record[f'held_out.{name}'] = record[f'held_out.{name}'][~dogs]
  np.savez(run / IDENTITY, **record)
  (run / 'dataset.json').unlink()  # Its fingerprints are of the images before.
  code, _, err = run_command(calibrate, f'--workdir={run}', '--threshold=0.9', f'--data_dir={photos}')
  assert code == 2
  assert err.startswith(f"error: expected images of class 'dog' that the run in {run} was not trained on, found none: ")


def test_a_packed_run_keeps_the_record(moved, tmp_path):
  run, _, _ = moved
  pack(run, tmp_path / 'packed')
  assert (tmp_path / 'packed' / IDENTITY).read_bytes() == (run / IDENTITY).read_bytes()
