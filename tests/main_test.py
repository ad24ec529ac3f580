"""Tests of the program's exit code, of what it prints, and of what it refuses before a run starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import CONFIGS, QUICKSTART, TINY, contents, refusal

SIDES = 'set --config.model.image_side, .blocks, .halvings, .cascade or .growth_factors'


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
  ('field', 'message'),
  [
    (
      'name=PN3-dzd',
      "name 'PN3-dzd': 'z' at position 2 is none of d, x, 1 to 3; set --config.name",
    ),
    ('train.epochs=0', 'train.epochs must be more than 0 and at most 1,000,000, found 0.0; set --config.train.epochs'),
    (
      'train.schedule=stp',
      'train.schedule must be one of step, cosine, one_cycle, constant, found stp; set --config.train.schedule',
    ),
    (
      'model.image_side=20',
      f'image_side 20 cannot be halved 3 times, as pipeline 1 needs (3 at its entry, 0 between its blocks); {SIDES}',
    ),
    (
      'model.halvings=(2,2,1)',
      'cascade into block 2 of pipeline 2 joins different sides: it works at 4 x 4 and block 1 of pipeline 1 at 8 x 8; '
      f'{SIDES}',
    ),
    (
      'model.cascade=2.2,3.9',
      'cascade into block 9 of pipeline 3: it needs a block 8 in pipeline 2, and the pipelines have (1, 2, 3) blocks; '
      f'{SIDES}',
    ),
    ('model.blocks=1,2', f'blocks (1, 2) and halvings (3, 2, 1) must have one entry for each pipeline; {SIDES}'),
    (
      'model.growth_factors=(1,2)',
      f'growth_factors (1, 2) must have one entry for each side of blocks, the largest first: [16, 8, 4]; {SIDES}',
    ),
    ('model.blocks=(2,)', f'blocks (2,) and halvings (3, 2, 1) must have one entry for each pipeline; {SIDES}'),
    *(
      (
        f'model.blocks={typed}',
        'model.blocks must be at most 1,000 numbers from 1 to 1,000, such as "(1,2,3)", '
        f'found {read}; set --config.model.blocks',
      )
      for typed, read in [
        ('a', "('a',)"),
        ('None', '(None,)'),
      ]
    ),
    (
      'loss.exit_weights=(1,2)',
      'loss.exit_weights must have 3 entries, one for each exit of PN3-ddd, found (1, 2); '
      'set --config.loss.exit_weights',
    ),
    (
      'train.devices=9',
      'train.devices asks for 9 devices and 8 are here; set --config.train.devices',
    ),
    (
      'train.devices=3',
      'train.batch_size 32 cannot be shared evenly by 3 devices; '
      'set --config.train.batch_size or --config.train.devices',
    ),
    (
      'train.batch_size=1144',
      'expected at most 1137 images per batch (all training images), found 1144: lower --config.train.batch_size',
    ),
  ],
)
def test_refused_fields(tmp_path, field, message):
  assert refusal(QUICKSTART, f'--config.{field}') == message
  assert not contents(tmp_path)


def test_an_unknown_data_set(tmp_path, monkeypatch):
  monkeypatch.delenv('PARANET_DATA_DIR', raising=False)
  message = refusal(QUICKSTART, '--config.data.name=cifar1000')
  assert message.startswith("unknown data set 'cifar1000'; nearest: cifar100, ")
  assert message.endswith('; set --config.data.name=...')
  assert not contents(tmp_path)


def test_labels_outside_the_classes(tmp_path):
  message = refusal(QUICKSTART, '--config.model.num_classes=5')
  assert message.startswith('expected labels 0 to 4 (5 classes), found label ')
  assert message.endswith(' of digits: set --config.model.num_classes=10')
  assert not contents(tmp_path)


@pytest.mark.parametrize(
  ('made', 'message'),
  [
    ((), 'expected a folder of images, found no folder {0}: name it with --config.data.data_dir=...'),
    (('train/cat', 'test/cat'), 'found no images there: name another folder with --config.data.data_dir=...'),
    (
      ('train/cat/1.png', 'train/dog', 'test/cat/1.png'),
      "found no images of class 'dog': add some or remove {0}/train/dog",
    ),
  ],
)
def test_a_folder_without_images(tmp_path, made, message):
  for path in (tmp_path / 'mine' / name for name in made):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'') if path.suffix else path.mkdir()
  before = contents(tmp_path)
  said = refusal(QUICKSTART, '--config.data.name=folder', '--config.data.data_dir=mine')
  assert said.startswith('expected ') and said.endswith(message.format(tmp_path / 'mine'))
  assert contents(tmp_path) == before


def test_blocks_for_another_number_of_pipelines(tmp_path):
  message = refusal(QUICKSTART, '--config.model.blocks=1,2', '--config.model.halvings=2,1')
  assert message == (
    'model.blocks and model.halvings must have 3 entries, one for each pipeline of PN3-ddd, found (1, 2) and (2, 1); '
    'set --config.model.blocks and --config.model.halvings'
  )
  assert not contents(tmp_path)


def test_describing_a_data_set_whose_classes_are_not_known():
  assert refusal(QUICKSTART, '--mode=describe', '--config.data.name=folder') == (
    "the number of classes of data set 'folder' is not known without reading it; set --config.model.num_classes"
  )


@pytest.mark.parametrize(
  ('workdir', 'message'),
  [
    ('file', 'workdir {0} must be a folder, found a file; set --workdir'),
    ('file/below', 'workdir {0} must be a folder, found a file; set --workdir'),
    ('dangling', 'workdir {0} must be a folder, found a dangling link; set --workdir'),
    ('x' * 300, 'workdir {0} cannot be created: File name too long; set --workdir'),
    ('caf\udce9', 'expected a folder whose path is UTF-8, found {0}; rename it, or set --workdir'),
  ],
)
def test_a_workdir_that_cannot_be(tmp_path, workdir, message):
  (tmp_path / 'file').write_text('mine')
  (tmp_path / 'dangling').symlink_to('nothing')
  assert refusal(*TINY, f'--workdir={workdir}') == message.format(tmp_path / ascii(workdir)[1:-1])
  assert contents(tmp_path) == {'file': b'mine', 'dangling': None}


def test_a_configuration_that_is_a_dangling_link_or_may_not_be_reached(tmp_path, monkeypatch):
  (tmp_path / 'a.py').symlink_to('nothing')
  assert refusal(f'--config={tmp_path}/a.py') == (
    f'expected a configuration file at {tmp_path}/a.py, found a link to a file that does not exist; '
    'set --config, such as configs/quickstart.py'
  )

  def refuse(path):  # Root may enter every folder.
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.setattr(Path, 'is_file', refuse)
  assert refusal(f'--config={tmp_path}/a.py') == (
    f'{tmp_path}/a.py cannot be read or written (Permission denied); fix that, or name another path'
  )


def test_a_workdir_that_is_not_writable(tmp_path, monkeypatch):
  # Not by its permissions: root may write everywhere.
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  assert refusal(*TINY, f'--workdir={tmp_path}') == f'workdir {tmp_path} is not writable; set --workdir'
  assert not contents(tmp_path)


def saved_with(epochs):
  """A saved configuration of the fewest fields."""
  sections = f'"model": {{"image_side": 8}}, "data": {{"name": "digits"}}, "train": {{"epochs": {epochs}}}'
  return f'{{"name": "PN2-dd", "seed": 0, {sections}}}'


@pytest.mark.parametrize(
  ('saved', 'arguments', 'message'),
  [
    (None, TINY, 'expected a checkpoint in {0}/checkpoints, found none; train first, or set --workdir'),
    (None, (), 'expected a run with a config.json in {0}, found none; set --workdir'),
    ('{"seed"', (), '{0}/config.json is not a JSON object (Expecting'),
    (
      '[1, 2]',
      (),
      '{0}/config.json is not a JSON object (it holds [1, 2]); restore it, or set --workdir for a new run',
    ),
    (saved_with('1'), (), 'expected a checkpoint in {0}/checkpoints, found none; train first, or set --workdir'),
    (saved_with('1, "epoch": 1'), (), '{0}/config.json has a field train.epoch that this version does not know; '),
    (saved_with('"many"'), (), '{0}/config.json does not fit (Could not override field'),
    (saved_with('null'), (), 'train.epochs must have a value, found None; set --config.train.epochs'),
    ('{}', (), '{0}/config.json is not the configuration of a run (it lacks the field name); restore it, or set'),
    ('{"name": "a", "seed": 0, "model": 5}', (), '{0}/config.json is not the configuration of a run (it lacks the'),
  ],
)
def test_evaluating_what_is_not_there(tmp_path, saved, arguments, message):
  if saved:
    (tmp_path / 'config.json').write_text(saved)
  before = contents(tmp_path)
  assert refusal(*arguments, '--mode=eval', f'--workdir={tmp_path}').startswith(message.format(tmp_path))
  assert contents(tmp_path) == before


def test_evaluating_a_dangling_link(tmp_path):
  (tmp_path / 'run').symlink_to('nothing')
  message = f'expected a run with a config.json in {tmp_path}/run, found a dangling link; set --workdir'
  assert refusal('--mode=eval', f'--workdir={tmp_path}/run') == message


def test_training_over_a_damaged_configuration(tmp_path):
  (tmp_path / 'config.json').write_text('{"name": ')
  message = refusal(*TINY, f'--workdir={tmp_path}')
  assert message.startswith(f'{tmp_path}/config.json is not a JSON object (Expecting value')
  assert message.endswith('restore it, or set --workdir for a new run')
  assert contents(tmp_path) == {'config.json': b'{"name": '}


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    (
      '--config=configs/quickstar.py',
      'expected a configuration file at configs/quickstar.py, found none; did you mean',
    ),
    ('--config=configs/paranet.py:PN3-dzd', "name 'PN3-dzd': 'z' at position 2 is none of d, x, 1 to 3; "),
  ],
)
def test_a_process_of_its_own(argument, message):
  result = subprocess.run(
    [sys.executable, '-m', 'paranet_jax.main', argument], cwd=CONFIGS.parent, capture_output=True, text=True
  )
  assert (result.returncode, result.stdout) == (2, '')
  assert result.stderr.startswith(f'error: {message}') and result.stderr.count('\n') == 1


PACKAGE = CONFIGS.parent / 'paranet_jax'
COMMANDS = ['main', 'pack', *sorted(path.parent.name for path in PACKAGE.glob('*/__main__.py'))]


@pytest.mark.parametrize('name', COMMANDS)
def test_the_help_of_a_command_needs_no_jax(tmp_path, name):
  (tmp_path / 'jax.py').write_text('raise ImportError("not needed")')
  result = subprocess.run(
    [sys.executable, '-m', f'paranet_jax.{name}', '--help'],
    cwd=CONFIGS.parent,
    env=os.environ | {'PYTHONPATH': str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert (result.returncode, result.stderr) == (0, '')
  assert result.stdout.lstrip().startswith(f'usage: python -m paranet_jax.{name} ')
