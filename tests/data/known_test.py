"""Tests of the registry of data sets, and of one that another package adds, in every command."""

import json

import numpy as np
import pytest
import shapes
from ml_collections import ConfigDict
from PIL import Image
from running import QUICKSTART, run_command, run_main

from paranet_jax.base_config import base_config
from paranet_jax.calibrate.__main__ import main as calibrate
from paranet_jax.config import differences
from paranet_jax.data.dataset import Source
from paranet_jax.data.known import DATASETS, KnownDataset, known_dataset, register_source
from paranet_jax.data.load import load_dataset
from paranet_jax.ensemble.__main__ import main as ensemble
from paranet_jax.export.__main__ import main as export
from paranet_jax.host.errors import UserError
from paranet_jax.pack import main as pack
from paranet_jax.plan import plan as plan_lib
from paranet_jax.plan.__main__ import main as plan
from paranet_jax.predict.__main__ import main as predict

FLAGS = (
  QUICKSTART,
  '--config.name=PN1-d',
  '--config.model.layers_per_block=1',
  '--config.model.growth_rate=2',
  '--config.model.image_side=8',
  '--config.data.name=shapes',
  '--config.data.held_out=18',
  '--config.train.batch_size=20',
  '--config.train.epochs=1',
  '--config.train.devices=1',
)


# Classes, images, mirrored, padding at side 32, and whether data_dir identifies the images.
FACTS = {
  'cifar100': (100, (50_000, 10_000), True, 4, False),
  'cifar10:3.0.2': (10, (50_000, 10_000), True, 4, False),
  'digits': (10, (1437, 360), False, 1, False),
  'imagenet2012': (1000, (1_281_167, 50_000), True, 4, False),
  'folder': (None, None, True, 4, True),
  'mnist': (None, None, False, 4, False),
  'emnist/letters:3.1.0': (None, None, False, 4, False),
  'some_other': (None, None, True, 4, False),
}


@pytest.mark.parametrize('name', FACTS)
def test_facts(name):
  known = known_dataset(name)
  facts = known.num_classes, known.counts, known.mirrored, 32 // known.padding_share, known.in_data_dir
  assert facts == FACTS[name]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Workdir of a calibrated run on the data set of another package."""
  with pytest.MonkeyPatch.context() as patch:
    shapes.install(tmp_path_factory.mktemp('site'), patch)
    workdir = tmp_path_factory.mktemp('runs') / 'shapes'
    code, _, err = run_main(*FLAGS, f'--workdir={workdir}')
    assert code == 0, err
    code, out, err = run_command(calibrate, f'--workdir={workdir}', '--threshold=0.5')
    assert code == 0 and 'shapes' in out, err
    yield workdir


def test_another_packages_data_set_trains_and_evaluates(run):
  facts = json.loads((run / 'dataset.json').read_text())
  assert (facts['name'], facts['version'], tuple(facts['class_names'])) == ('shapes', '2.0', shapes.CLASSES)
  assert facts['counts'] == {'train': 42, 'held_out': 18, 'test': 20}
  code, out, err = run_main(f'--workdir={run}', '--mode=eval', '--json')
  assert code == 0 and json.loads(out)['step'] == 2, err


def test_its_facts_are_known_without_reading_it(run, monkeypatch):
  monkeypatch.setattr(KnownDataset, 'open', None)
  monkeypatch.setattr(plan_lib, 'second_batch', lambda *_: 10_000)  # More than there are images: it is not compiled.
  code, out, err = run_main(*FLAGS, '--mode=describe', '--json')
  assert code == 0 and (json.loads(out)['num_classes'], json.loads(out)['dataset']) == (3, 'shapes'), err
  code, out, err = run_command(plan, *FLAGS, '--devices=1', '--json')
  assert code == 0 and json.loads(out)['dataset'] == 'shapes', err


def test_it_is_predicted_exported_packed_and_combined(run, tmp_path):
  Image.new('L', (8, 8), 200).save(tmp_path / 'image.png')
  code, out, err = run_command(predict, tmp_path / 'image.png', f'--workdir={run}', '--format=json')
  assert code == 0 and any(name in out for name in shapes.CLASSES), err
  code, _, err = run_command(export, f'--workdir={run}', f'--out={tmp_path / "bundle"}')
  assert code == 0, err
  assert json.loads((tmp_path / 'bundle' / 'classes.json').read_text()) == list(shapes.CLASSES)
  assert 'License of the data: public domain.' in (tmp_path / 'bundle' / 'README.md').read_text()
  code, _, err = run_command(pack, f'--workdir={run}', f'--out={tmp_path / "packed"}')
  assert code == 0, err
  code, out, err = run_command(ensemble, run, tmp_path / 'packed', '--json')
  assert code == 0 and len(json.loads(out)) == 2, err


def test_its_augmentation_and_its_folder(run):
  config = base_config()
  config.data.name = 'shapes'
  found = load_dataset(config.data, image_side=8, channels=1)
  assert (found.crop_padding, found.flip) == (2, False)
  np.testing.assert_array_equal(found.train.images[4], np.full((8, 8, 1), 104))
  here, there = ({'name': 'shapes', 'data_dir': place} for place in 'ab')
  assert differences({'data': here}, {'data': there}) == ['data.data_dir: a -> b']


def test_register_source(monkeypatch):
  monkeypatch.setattr(DATASETS, 'known', dict(DATASETS.known))  # Other tests list what is registered.
  known = KnownDataset(lambda config, side, channels: Source('registered', '', ('a',), None))
  for _ in range(2):
    register_source('registered', known)
  assert known_dataset('registered') is known
  assert known_dataset('registered').open(ConfigDict(), 8, 1).name == 'registered'
  with pytest.raises(ValueError, match="there is already a data set 'registered'"):
    register_source('registered', KnownDataset())
  config = base_config()
  config.data.name = 'registred'
  with pytest.raises(UserError, match="unknown data set 'registred'; nearest: registered"):
    load_dataset(config.data, image_side=8, channels=1)
