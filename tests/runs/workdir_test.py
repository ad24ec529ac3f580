"""Tests of a run's folder and of what is read back from it. How it refuses is tested in main_test.py."""

import json

import pytest

from paranet_jax.base_config import base_config
from paranet_jax.host.errors import UserError
from paranet_jax.runs.workdir import prepare_workdir, restore_config, save_config


def changed(**fields):
  """The base configuration with some `section__field` changed."""
  config = base_config()
  config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  return config


CHANGED = changed(
  name='PN2-2d',
  seed=-5,
  model__blocks=(1, 2),
  model__num_classes=7,
  model__cascade='2.2',
  data__flip=False,
  loss__exit_weights=(1, 0.5),
  train__drop_epochs=(),
)


def test_what_is_saved_is_restored(tmp_path):
  save_config(tmp_path, CHANGED)
  restored = restore_config(tmp_path)
  assert restored.to_dict() == CHANGED.to_dict()
  assert restored.model.blocks == (1, 2) and isinstance(restored.model.blocks, tuple)
  assert restored.is_locked
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_a_field_that_was_not_known_yet_takes_its_default(tmp_path):
  saved = json.loads(CHANGED.to_json())
  del saved['model']['blocks'], saved['log']
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  restored = restore_config(tmp_path)
  assert restored.model.blocks is None and restored.log.every_steps == 20 and restored.seed == -5


def test_a_field_saved_by_its_old_name_is_the_present_one(tmp_path):
  saved = json.loads(CHANGED.to_json())
  del saved['train']['backbone_epochs']
  (tmp_path / 'config.json').write_text(json.dumps(saved | {'train': saved['train'] | {'body_epochs': 2.0}}))
  same = CHANGED.copy_and_resolve_references()
  same.train.backbone_epochs = 2.0
  assert restore_config(tmp_path).to_dict() == same.to_dict()
  prepare_workdir(tmp_path, same, accept_changes=False)


def test_preparing_makes_the_folder_and_nothing_in_it(tmp_path):
  workdir = tmp_path / 'runs' / 'new'
  prepare_workdir(workdir, CHANGED, accept_changes=False)
  assert workdir.is_dir() and not list(workdir.iterdir())


@pytest.mark.parametrize('accept_changes', [False, True])
def test_preparing_for_the_same_configuration(tmp_path, accept_changes):
  save_config(tmp_path, CHANGED)
  prepare_workdir(tmp_path, CHANGED, accept_changes)
  assert restore_config(tmp_path).to_dict() == CHANGED.to_dict()


@pytest.mark.parametrize('content', ['', '{"model": ', '{}', '{"architectures": ["another program"]}'])
def test_what_is_no_configuration_is_not_overwritten(tmp_path, content):
  (tmp_path / 'config.json').write_text(content)
  for accept_changes in (False, True):
    with pytest.raises(UserError, match='config.json .*restore it, or set --workdir for a new run'):
      prepare_workdir(tmp_path, CHANGED, accept_changes)


def test_another_configuration_needs_to_be_accepted(tmp_path):
  save_config(tmp_path, CHANGED)
  other = changed(**{**{'name': 'PN2-2d', 'seed': -5}, 'model__blocks': (2, 2)})
  with pytest.raises(UserError, match=r'model\.blocks: \[1, 2\] -> \[2, 2\]; .*--accept_config_changes'):
    prepare_workdir(tmp_path, other, accept_changes=False)
  prepare_workdir(tmp_path, other, accept_changes=True)
  # Preparing does not save: the run may yet be refused.
  assert restore_config(tmp_path).to_dict() == CHANGED.to_dict()
  save_config(tmp_path, other)
  assert restore_config(tmp_path).to_dict() == other.to_dict()


def test_another_data_folder_is_the_same_run(tmp_path):
  save_config(tmp_path, changed(data__data_dir='/here'))
  prepare_workdir(tmp_path, changed(data__data_dir='/there'), accept_changes=False)


def test_images_that_moved_are_the_same_run(tmp_path, monkeypatch):
  save_config(tmp_path, changed(data__name='folder', data__data_dir='/cats'))
  there = changed(data__name='folder', data__data_dir='/there')
  with pytest.raises(UserError, match='data_dir: /cats -> /there .* --data_dir for the same images in another place'):
    prepare_workdir(tmp_path, there, accept_changes=False)
  prepare_workdir(tmp_path, there, accept_changes=False, moved=True)
  monkeypatch.setenv('PARANET_DATA_DIR', '/there')
  prepare_workdir(tmp_path, there, accept_changes=False)
  there.seed += 1
  with pytest.raises(UserError, match=r'configuration: seed: -?\d+ -> -?\d+ \(saved'):
    prepare_workdir(tmp_path, there, accept_changes=False, moved=True)
