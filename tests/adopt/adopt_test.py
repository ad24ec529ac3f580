"""The command `adopt`: from a PyTorch file and images to a run, and what it refuses."""

import json

import jax
import numpy as np
import pytest
import resnet_weights
from PIL import Image
from running import run_command
from tensor_files import safetensors_bytes

from paranet_jax.adopt.__main__ import main
from paranet_jax.early.loaded_run import load
from paranet_jax.models.adopted.cifar_resnet import architecture
from paranet_jax.models.adopted.registry import ARCHITECTURES
from paranet_jax.models.adopted.tensors import to_state_dict


@pytest.fixture
def tiny(monkeypatch, tmp_path):
  """A small architecture, its weights and 40 images, in the current folder."""
  monkeypatch.setattr(ARCHITECTURES, 'known', {'cifar_resnet8': architecture})
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'weights').write_bytes(safetensors_bytes(resnet_weights.draw(8)))
  (tmp_path / 'images').mkdir()
  for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (40, 9, 9, 3), np.uint8)):
    Image.fromarray(image).save(tmp_path / 'images' / f'{number}.png')
  return tmp_path


GIVEN = ('--arch=cifar_resnet8', '--weights=weights', '--workdir=run')


def test_from_weights_and_images_to_a_run(tiny):
  flags = ('--images=images', '--config.train.epochs=4', '--config.model.image_side=8')
  result = run_command(main, *GIVEN, *flags)
  assert result.code == 0, result
  assert 'exits: bn1,layer1.0 (suggested; ' in result.out
  assert 'backbone from' in result.out and 'its last exit, new others' in result.out
  assert '--budget=' in result.out.split('next:\n')[1]
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
  # The same command finds that nothing is left to do.
  again = run_command(main, *GIVEN, *flags)
  assert again.code == 0 and 'resuming from the checkpoint' in again.out


def test_new_classes_get_a_new_last_exit(tiny):
  for number, file in enumerate(sorted((tiny / 'images').iterdir())):
    folder = tiny / 'sorted' / ('left', 'right', 'up')[number % 3]
    folder.mkdir(parents=True, exist_ok=True)
    file.rename(folder / file.name)
  flags = ('--data=sorted', '--classes', '--targets=both', '--config.train.epochs=4', '--config.model.image_side=8')
  result = run_command(main, *GIVEN, *flags, '--exits=layer1')
  assert result.code == 0, result
  assert 'labels, exit 2' in result.out and result.out.count('given') == 0
  run = load('run')
  assert run.dataset.class_names == ('left', 'right', 'up') and run.dataset.mean == (0.485, 0.456, 0.406)
  params, drawn = jax.device_get(run.variables['params']), resnet_weights.draw(8)
  assert 'linear' not in params and params['exit_2']['classifier']['kernel'].shape == (64, 3)
  kernel = drawn['layer3.0.conv2.weight'].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(params['layer3.0']['conv2']['kernel'], kernel)
  assert params['exit_2']['classifier']['bias'].any()  # It has learned.


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--arch=cifar_resnet8',), 'the following arguments are required: --weights; see --help'),
    (('--arch=a', '--weights=b'), 'the following arguments are required: --workdir; see --help'),
    (
      GIVEN,
      'expected images for the exits to learn from, found none; set --images (without labels), --data (in a folder for '
      'each class) or --config.data.name',
    ),
    (
      (*GIVEN, '--images=images', '--targets=both'),
      '--targets=both needs labels, found --images; set --data to a folder of images for each class',
    ),
    (
      (*GIVEN, '--images=images', '--classes'),
      '--classes needs labels, found --images; set --data to a folder of images for each class',
    ),
    (
      (*GIVEN, '--images=images', '--exits=layer9'),
      "expected a place of cifar_resnet8 (bn1, layer1.0, layer2.0, layer3.0), found 'layer9'; set --exits or --head",
    ),
    ((*GIVEN, '--images=images', '--exit=layer1'), 'unrecognized arguments: --exit=layer1; see --help'),
  ],
)
def test_refusals(tiny, flags, message):
  assert run_command(main, *flags) == (2, '', f'error: {message}\n')
  assert not (tiny / 'run').exists()
