"""The command `adopt`: from a PyTorch file and images to a run, and what it refuses."""

import argparse
import json
import shutil
import signal

import jax
import numpy as np
import pytest
import resnet_weights
from PIL import Image
from running import run_command
from tensor_files import safetensors_bytes

from paranet_jax import config as config_lib
from paranet_jax import task, train
from paranet_jax.adopt.__main__ import main
from paranet_jax.adopt.run import configure
from paranet_jax.early.loaded_run import load
from paranet_jax.frozen import keep_features
from paranet_jax.host.files import write_json
from paranet_jax.models.adopted.cifar_resnet import architecture
from paranet_jax.models.adopted.class_names import class_names
from paranet_jax.models.adopted.registry import ARCHITECTURES
from paranet_jax.models.adopted.tensors import to_state_dict
from paranet_jax.runs.dataset_facts import restore_dataset_facts
from paranet_jax.runs.workdir import restore_config


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  """A folder with the weights of a small architecture, 40 images, and these by class; it is the current folder."""
  folder = tmp_path_factory.mktemp('tiny')
  (folder / 'weights').write_bytes(safetensors_bytes(resnet_weights.draw(8)))
  images = np.random.default_rng(0).integers(0, 256, (40, 9, 9, 3), np.uint8)
  for number, name in enumerate(class_names('cifar10', 10) * 4):
    for place in (folder / 'images', folder / 'sorted' / name, folder / 'new' / ('left', 'right', 'up')[number % 3]):
      place.mkdir(parents=True, exist_ok=True)
      Image.fromarray(images[number]).save(place / f'{number}.png')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ARCHITECTURES, 'known', {'cifar_resnet8': architecture})
    patch.chdir(folder)
    yield folder


GIVEN = ('--arch=cifar_resnet8', '--weights=weights', '--workdir=run')
REFUSED = (*GIVEN[:2], '--workdir=none')
FLAGS = ('--images=images', '--config.train.epochs=4', '--config.model.image_side=8')


@pytest.fixture(scope='module')
def outputs(tiny):
  """What a run printed that was stopped while it computed features, and what the same command then did."""

  def keep_after_signal(*given, **named):
    signal.raise_signal(signal.SIGTERM)
    return keep_features(*given, **named)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(task, 'keep_features', keep_after_signal)
    stopped = run_command(main, *GIVEN, *FLAGS)
  result = run_command(main, *GIVEN, *FLAGS)
  assert (stopped.code, result.code) == (0, 0), result
  return stopped.out, result.out


def test_from_weights_and_images_to_a_run(tiny, outputs):
  stopped, resumed = outputs
  assert 'backbone from' in stopped and 'its last exit, new others' in stopped and 'MB kept' not in stopped
  assert stopped.splitlines()[-1] == 'stopped by SIGTERM after step 0, saved; the same command resumes'
  assert 'exits: bn1,layer1.0 (suggested; ' in resumed and '--budget=' in resumed.split('next:\n')[1]
  assert 'resuming from the checkpoint at step 0' in resumed and 'features of 32 training images' in resumed
  run = load('run')
  assert (run.dataset.mean, run.dataset.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  assert run.dataset.class_names[:2] == ('airplane', 'automobile') and len(run.dataset.class_names) == 10
  # The backbone and its classifier are what they were, bit for bit.
  found, drawn = to_state_dict(jax.device_get(run.variables)), resnet_weights.draw(8)
  assert found.keys() == drawn.keys()
  for name, tensor in drawn.items():
    np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)
  lines = [json.loads(line) for line in (tiny / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert {line['split'] for line in lines} == {'train', 'held_out', 'test'}


def configured(tiny, **given):
  """Of a run that has not begun."""
  flags = {'exits': 'layer1', 'targets': None, 'classes': False, 'images': None, 'data': None, 'workdir': tiny / 'no'}
  given = argparse.Namespace(arch='cifar_resnet8', **flags | given)
  return configure(given, architecture('cifar_resnet56'), tiny / 'weights', 10)


@pytest.mark.parametrize(
  ('head', 'targets', 'expected'),
  [
    ('blocks', None, (3, 'kl', 'muon', True, True, True)),
    ('blocks', 'labels', (3, 'kl', 'muon', True, False, False)),
    ('conv', None, (None, 'squared_error', 'sgd', False, False, False)),
  ],
)
def test_heads_learn_in_their_own_way(tiny, head, targets, expected):
  images, data = (None, 'sorted') if targets else ('images', None)
  config = configured(tiny, head=head, targets=targets, images=images, data=data)
  config_lib.validate(config)
  found = config.model.copies, config.loss.matching, config.train.optimizer, config.data.flip
  assert (*found, config.loss.match_mirrored, config.loss.match_features > 0) == expected
  assert bool(config.train.feature_shift) == (head == 'blocks')


@pytest.mark.parametrize(('count', 'learned'), [(4, 3), (8, 6), (19, 16), (46, 37), (1000, 128)])
def test_batches_are_no_larger_than_the_images_left_to_learn_from(tiny, tmp_path, monkeypatch, count, learned):
  monkeypatch.setattr('paranet_jax.adopt.run.find_images', lambda _: argparse.Namespace(images=[''] * count))
  assert configured(tiny, head='conv', images=tmp_path).train.batch_size == learned


@pytest.fixture
def begun(monkeypatch):
  """The configurations of runs, which do not train."""
  found = []
  monkeypatch.setattr('paranet_jax.adopt.run.train_and_evaluate', lambda config, *_: found.append(config))
  return found


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    # 50,000 images: 351 steps of 128 an epoch are enough.
    (('--config.data.name=cifar10',), (5000, 128, 30.0, 6.0)),
    (('--config.data.name=cifar10', '--head=blocks'), (5000, 128, 5.0, 1.0)),
    # 1,437 images, of which 143 are held out, make 10 steps an epoch.
    (('--config.data.name=digits',), (143, 128, 200.0, 40.0)),
    (('--config.data.name=digits', '--head=blocks'), (143, 128, 31.0, 6.2)),
    (('--config.data.name=digits', '--config.train.epochs=7', '--config.data.held_out=50'), (50, 128, 7.0, 40.0)),
    # 40 images: 4 held out and 4 to test on.
    (('--config.data.name=images', '--config.data.data_dir=images'), (4, 32, 2000.0, 400.0)),
    (('--config.data.name=folder', '--data_dir=sorted'), (4, 32, 2000.0, 400.0)),
  ],
)
def test_a_data_set_by_its_name_is_learned_from_by_the_recipe(tiny, tmp_path, begun, flags, expected):
  assert run_command(main, *GIVEN[:2], f'--workdir={tmp_path}/new', '--exits=layer1', *flags).code == 0
  data, train = begun[0].data, begun[0].train
  assert (data.held_out, train.batch_size, train.epochs, begun[0].eval.every_epochs) == expected
  assert data.test_fraction == 0.1


def test_a_whole_network_learns_from_a_data_set_by_the_recipe(tiny, outputs, tmp_path, begun):
  flags = ('--weights=run', f'--workdir={tmp_path}/new', '--config.data.name=cifar10')
  assert run_command(main, '--arch=cifar_resnet8', *flags).code == 0
  assert (begun[0].data.held_out, begun[0].train.batch_size, begun[0].train.epochs) == (5000, 128, 10)


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    ((), 1 / 16),  # 32 places.
    (('--config.model.image_side=8',), 0.0),
    (('--exits=layer2', '--config.model.image_side=30'), 0.0),
    (('--exits=layer1,layer2', '--config.model.image_side=30'), 1 / 16),
    (('--config.data.crop_padding=4',), 0.0),
    (('--config.train.cutout=4',), 0.0),
    (('--config.model.image_side=8', '--config.train.feature_shift=0.125'), 0.125),
  ],
)
def test_features_are_shifted_where_they_can_be(tiny, tmp_path, begun, flags, expected):
  given = (*GIVEN[:2], f'--workdir={tmp_path}/new', '--images=images', '--head=blocks', '--exits=layer1')
  assert run_command(main, *given, *flags).code == 0
  assert begun[0].train.feature_shift == expected


def test_a_run_resumes_with_images_in_another_place(tiny, outputs):
  shutil.copytree('run', 'resumed')
  shutil.copytree('images', 'moved')
  given = (*GIVEN[:2], '--workdir=resumed', *FLAGS[1:])
  other = run_command(main, *given, '--images=moved')
  assert other.code == 2 and '; set --workdir for a new run, --data_dir for the same images in another' in other.err
  for place in ('images', 'gone'):
    assert run_command(main, *given, f'--images={place}', '--data_dir=moved').code == 0
  longer = (*given, '--images=images', '--config.train.epochs=5')
  changed = run_command(main, *longer)
  assert changed.code == 2 and 'or --accept_config_changes to train with the new one' in changed.err
  assert run_command(main, *longer, '--accept_config_changes').code == 0
  assert restore_config(tiny / 'resumed').train.epochs == 5


def test_a_run_resumes_with_other_images_on_request(tiny, outputs):
  shutil.copytree('run', 'others')
  (tiny / 'replaced').mkdir()
  for number, image in enumerate(np.random.default_rng(1).integers(0, 256, (80, 9, 9, 3), np.uint8)):
    Image.fromarray(image).save(tiny / 'replaced' / f'{number}.png')
  given = (*GIVEN[:2], '--workdir=others', '--images=images', '--data_dir=replaced', *FLAGS[1:])
  refused = run_command(main, *given)
  assert refused.code == 2 and '--accept_data_changes' in refused.err, refused
  assert run_command(main, *given, '--accept_data_changes').code == 0


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (
      ('--config.train.accumulate_steps=5',),  # 40 images, of which 4 are held out and 4 tested on, are a batch.
      'train.accumulate_steps must be at most the 4 steps of the run, found 5, so that no weight would change; set '
      '--config.train.accumulate_steps or --config.train.epochs',
    ),
    (
      ('--config.loss.hard_label_weight=0.5', '--targets=last', '--head=conv'),
      'loss.hard_label_weight 0.5 is the share of labels beside distillation, and cifar_resnet8-exits matches logits '
      "with loss.matching 'squared_error'; set --config.loss.matching=kl, or --config.loss.hard_label_weight=0",
    ),
  ],
)
def test_what_would_change_nothing_is_refused_of_a_new_run(tiny, tmp_path, flags, message):
  given = (*GIVEN[:2], f'--workdir={tmp_path}/new', '--data=sorted', *FLAGS[1:], '--exits=layer1')
  for _ in range(2):  # The folder has the facts of the weights the second time.
    assert run_command(main, *given, *flags)[::2] == (2, f'error: {message}\n')


def test_nothing_is_left_to_do(tiny, outputs):
  again = run_command(main, *GIVEN, *FLAGS)
  assert again.code == 0 and 'resuming from the checkpoint' in again.out and 'training images: ' not in again.out
  # The run keeps its normalization.
  began = f'--mean=0.485,0.456,0.406, with which {tiny}/run began'
  other = run_command(main, *GIVEN, *FLAGS, '--mean=0.5,0.5,0.5')
  assert (other.code, other.err) == (2, f'error: expected {began}, found 0.5,0.5,0.5; set --mean or --workdir\n')


def test_a_run_resumes_with_images_that_were_added(tiny, outputs, caplog):
  shutil.copytree('run', 'grown')
  before = restore_config(tiny / 'grown')
  added = tiny / 'images' / 'added.png'
  Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(added)
  try:
    result = run_command(main, *GIVEN[:2], '--workdir=grown', *FLAGS)
    other = run_command(main, *GIVEN[:2], '--workdir=grown', *FLAGS, '--config.train.batch_size=16')
  finally:
    added.unlink()
  assert result.code == 0 and 'resuming from the checkpoint' in result.out, result
  assert '(train 1 added, 0 gone; held_out 0 added, 0 gone; test 0 added, 0 gone)' in caplog.text
  assert restore_config(tiny / 'grown') == before and before.train.batch_size == 32
  assert other.code == 2 and 'a different configuration: train.batch_size: 32 -> 16 (saved -> now)' in other.err


def test_new_classes_get_a_new_last_exit(tiny):
  flags = ('--data=new', '--classes', '--targets=both', '--config.train.epochs=4', '--config.model.image_side=8')
  normalization = ('--mean=0.5,0.5,0.5', '--deviation=0.25,0.5,0.75')
  result = run_command(main, *GIVEN[:2], '--workdir=other', *flags, *normalization, '--exits=layer1')
  assert result.code == 0, result
  assert 'labels, exit 2' in result.out and result.out.count('given') == 0
  run = load('other')
  assert run.dataset.class_names == ('left', 'right', 'up')
  assert (run.dataset.mean, run.dataset.std) == ((0.5, 0.5, 0.5), (0.25, 0.5, 0.75))
  params, drawn = jax.device_get(run.variables['params']), resnet_weights.draw(8)
  assert 'linear' not in params and params['exit_2']['classifier']['kernel'].shape == (64, 3)
  kernel = drawn['layer3.0.conv2.weight'].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(params['layer3.0']['conv2']['kernel'], kernel)
  assert params['exit_2']['classifier']['bias'].any()  # It has learned.


def test_network_and_exits_train_together_afterwards(tiny, outputs, monkeypatch):
  monkeypatch.setattr(train, 'train_loop', lambda records, state, *unused: (state, None))  # To compile takes long.
  whole = ('--arch=cifar_resnet8', '--weights=run', '--workdir=whole')
  result = run_command(main, *whole, '--data=sorted', '--config.model.image_side=8')
  assert result.code == 0 and 'its exits' in result.out, result
  config = restore_config(tiny / 'whole')
  before, after = (restore_dataset_facts(tiny / name, 3) for name in ('run', 'whole'))
  assert (config.train.regime, config.model.exits, config.model.head) == ('joint', 'bn1,layer1.0', 'conv')
  assert (after.class_names, after.mean, after.std) == (before.class_names, before.mean, before.std)
  found = 'found --images; set --data to a folder of images for each class'
  common = f'the network and the exits of {tiny}/run train together as they are, and from labels, '
  for flags, message in {
    ('--images=images',): common + found,
    ('--data=sorted', '--mean=0.5,0.5,0.5'): f'{common}found --mean; leave out --mean',
    ('--data=sorted', '--head=conv'): f'{common}found --head; leave out --head',
  }.items():
    assert run_command(main, *whole[:2], '--workdir=none', *flags) == (2, '', f'error: {message}\n')
  message = (
    f'expected a run of adopt with --arch=cifar_resnet8, found --weights={tiny}/whole with cifar_resnet8, train.regime '
    "'joint'; set --weights"
  )
  write_json(tiny / 'whole' / 'summary.json', {})
  result = run_command(main, whole[0], '--weights=whole', '--workdir=none', '--data=sorted')
  assert result == (2, '', f'error: {message}\n')


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (
      ('--arch=cifar_resnet8', '--weights=images', '--workdir=none', '--data=images'),
      '--weights must be the folder of a finished run, and {here}/images has no config.json; set --weights',
    ),
    (('--arch=cifar_resnet8',), 'the following arguments are required: --weights; see --help'),
    (('--arch=a', '--weights=b'), 'the following arguments are required: --workdir; see --help'),
    (
      REFUSED,
      'expected images for the exits to learn from, found none; set --images (without labels), --data (in a folder for '
      'each class) or --config.data.name',
    ),
    (
      (*REFUSED, '--images=images', '--targets=both'),
      '--targets=both needs labels, found --images; set --data to a folder of images for each class',
    ),
    (
      (*REFUSED, '--images=images', '--classes'),
      '--classes needs labels, found --images; set --data to a folder of images for each class',
    ),
    (
      (*REFUSED, '--exits=layer1', '--config.data.name=nothing', '--classes'),
      "unknown data set 'nothing'; set --data or --config.data.name",
    ),
    (
      (*REFUSED, '--images=images', '--exits=layer9'),
      "expected a place of cifar_resnet8 (bn1, layer1.0, layer2.0, layer3.0), found 'layer9'; set --exits or --head",
    ),
    (
      (*REFUSED, '--images=images', '--mean=0.5'),
      'argument --mean: expected three numbers from 0 to 1, found 0.5; see --help',
    ),
    (
      (*REFUSED, '--images=images', '--deviation=0.5,0,0.5'),
      'argument --deviation: expected three numbers of more than 0, found 0.5,0,0.5; see --help',
    ),
    ((*REFUSED, '--images=images', '--exit=layer1'), 'unrecognized arguments: --exit=layer1; see --help'),
  ],
)
def test_refusals(tiny, flags, message):
  assert run_command(main, *flags) == (2, '', f'error: {message.replace("{here}", str(tiny))}\n')
  assert not (tiny / 'none').exists()
