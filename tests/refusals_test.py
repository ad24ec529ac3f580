"""What a user may find in the way of a run: each is one line, and loses nothing."""

import shutil

import pytest
from running import TINY, contents, refusal, run_main


@pytest.mark.parametrize('name', ['checkpoints', 'tensorboard'])
def test_a_file_in_place_of_a_folder(tmp_path, name):
  (tmp_path / name).write_text('mine')
  message = refusal(*TINY, f'--workdir={tmp_path}')
  assert message == f'workdir {tmp_path / name} must be a folder, found a file; set --workdir'
  assert (tmp_path / name).read_text() == 'mine'


@pytest.mark.parametrize('name', ['summary.json', 'metrics.jsonl', 'curves.png', 'confusion.png'])
def test_a_folder_in_place_of_a_file(tmp_path, name):
  (tmp_path / name).mkdir()
  assert refusal(*TINY, f'--workdir={tmp_path}') == (
    f'expected {tmp_path / name} to be a file, found a folder, a pipe or a dangling link; '
    'move it away, or set --workdir'
  )
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_another_programs_file_is_not_overwritten(tmp_path):
  (tmp_path / 'summary.json').write_text('mine')
  assert refusal(*TINY, f'--workdir={tmp_path}') == (
    f'{tmp_path} holds summary.json but no config.json, so no run wrote it; move it away, or set --workdir'
  )
  assert contents(tmp_path) == {'summary.json': b'mine'}


def test_a_damaged_checkpoint(tmp_path, finished_run):
  folder = shutil.copytree(finished_run, tmp_path / 'run') / 'checkpoints' / '140'
  shutil.rmtree(folder.with_name('47'))
  for damage in (lambda: shutil.rmtree(folder / 'state'), lambda: shutil.rmtree(folder / 'meta')):
    damage()
    for mode in ('train', 'eval'):
      message = refusal(f'--workdir={tmp_path / "run"}', f'--mode={mode}', started=mode == 'train')
      assert message.startswith(f'checkpoint {folder} is damaged (')
      assert message.endswith('); move that folder away to continue without it')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      ['--config.loss.exit_weights=(1,0,1)'],
      'loss.exit_weights must be more than 0 for exit 2, which PN3-x3d trains, found (1, 0, 1); '
      'set --config.loss.exit_weights, or give that exit an x in --config.name',
    ),
    (
      ['--config.train.cutout=9'],
      'train.cutout must be at most model.image_side 8, found 9; set --config.train.cutout',
    ),
    (
      ['--config.data.short_side=7'],
      'data.short_side must be at least model.image_side 8, found 7; set --config.data.short_side',
    ),
    (['--json'], '--json prints the result of describe or eval, found --mode=train; set --mode'),
    (
      ['--config.data.name=a\nb', '--mode=describe'],
      "the number of classes of data set 'a b' is not known without reading it; set --config.model.num_classes",
    ),
  ],
)
def test_one_line(arguments, message):
  assert refusal(*TINY, *arguments) == message


def test_a_version_of_a_known_data_set_is_described():
  assert run_main(*TINY, '--config.data.name=cifar100:3.0.2', '--mode=describe').code == 0


@pytest.mark.parametrize('field', ['train.batch_size=10000000', 'eval.batch_size=10000000', 'seeds=2', 'mode=eval'])
def test_a_run_without_enough_memory_is_refused_before_anything_is_read(tmp_path, monkeypatch, field):
  monkeypatch.setattr('paranet_jax.devices.device_memory', lambda device: 1e6 if '=1' not in field else 64e9)
  flag = '--mode=eval' if field.startswith('mode') else f'--config.{field}'
  message = refusal(*TINY, flag, '--config.model.image_side=32', f'--workdir={tmp_path}/run')
  assert message.startswith('expected a run that fits the ')
  assert message.endswith('.eval.batch_size, .model.image_side or the size of the network')
  assert not contents(tmp_path)
