"""A run on images whose class folder is then renamed: every command that reads them again refuses it."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
from PIL import Image
from running import QUICKSTART, contents, refusal, run_command, run_main

from paranet_jax.calibrate.__main__ import main as calibrate
from paranet_jax.config import with_data_dir
from paranet_jax.data.identity import together
from paranet_jax.early.loaded_run import load
from paranet_jax.ensemble.__main__ import main as ensemble
from paranet_jax.export.__main__ import main as export
from paranet_jax.export.contents import write_contents
from paranet_jax.host.processes import Coordinator
from paranet_jax.runs.dataset_facts import restore_dataset_facts, save_weights_facts
from paranet_jax.runs.learned import IDENTITY, restore_learned, save_learned
from paranet_jax.runs.packed import pack
from paranet_jax.runs.trained import read_task
from paranet_jax.runs.workdir import restore_config
from paranet_jax.task import agreed_task, build_task

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


@pytest.mark.parametrize('damage', ['gone', 'damaged'])
def test_calibrating_again_repairs_the_facts_of_the_data(moved, damage):
  run, photos, _ = moved
  before = (run / 'dataset.json').read_text()
  (run / 'dataset.json').unlink() if damage == 'gone' else (run / 'dataset.json').write_text('{')
  result = run_command(calibrate, f'--workdir={run}', '--threshold=0.8', f'--data_dir={photos}')
  assert (result.code, result.err) == (0, '')
  assert (run / 'dataset.json').read_text() == before


def test_added_images_change_no_normalization(moved, tmp_path):
  """Of what every command reads: those that read the images again, and those that do not."""
  run, photos, _ = moved
  facts = restore_dataset_facts(run, 3)
  recorded = facts.mean, facts.std
  for number in range(10):
    Image.new('RGB', (8, 8), (250, 250, 200 + number)).save(photos / f'cat/bright {number}.png')
  config = with_data_dir(restore_config(run), photos)
  fresh = build_task(config)
  assert np.abs(np.subtract(fresh.preprocessing.mean, recorded[0])).max() > 0.05  # Of a new run.
  resumed = agreed_task(config, Coordinator(), restore_learned(run, 3))
  evaluated = read_task(config, run, None, jax.local_devices()[:1]).task  # By --mode=eval and calibrate.
  ensemble = build_task(config, learned=together([restore_learned(run, 3)] * 2))
  for task in (resumed, evaluated, ensemble):
    assert task.preprocessing[:2] == recorded and len(task.dataset.train) > 24
  save_learned(run, resumed.dataset)
  after = restore_dataset_facts(run, 3)
  assert (after.mean, after.std) == recorded and after.counts['train'] > facts.counts['train']
  loaded = load(run)
  write_contents(tmp_path, loaded, loaded.plan)
  preprocessing = json.loads((tmp_path / 'preprocessing.json').read_text())
  assert (tuple(preprocessing['mean']), tuple(preprocessing['std'])) == recorded


def test_a_normalization_that_comes_with_weights_stays(moved):
  """As their classes do, whatever is trained on them afterwards."""
  run, photos, _ = moved
  config = with_data_dir(restore_config(run), photos)
  for name in ('dataset.json', IDENTITY):
    (run / name).unlink()
  shutil.rmtree(run / 'checkpoints')
  save_weights_facts(run, 'theirs', ['cat', 'dog'], [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
  learned = restore_learned(run, 3)
  assert not learned.by_position and learned.count is None
  task = agreed_task(config, Coordinator(), learned)
  assert task.preprocessing[:2] == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
  save_learned(run, task.dataset)
  facts = restore_dataset_facts(run, 3)
  assert (facts.mean, facts.std) == task.preprocessing[:2] and facts.class_names == ('cat', 'dog')
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
