"""PyTorch's CIFAR ResNets compute the same logits here, and what does not fit is named."""

import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import resnet_weights
from tensor_files import safetensors_bytes

from paranet_jax.host.errors import UserError
from paranet_jax.models.resnet import ResNet
from paranet_jax.weights.cifar_resnet import backbone_table, read_backbone, read_cifar_resnet

FIXTURES = Path(__file__).resolve().parents[1] / 'fixtures' / 'pytorch'
REAL = Path(os.environ.get('PARANET_DATA_DIR', '')).parent / 'cifar_resnets'
"""Beside the prepared data sets."""


@pytest.fixture
def save(tmp_path):
  def save(depth=8, remove=(), classes=10, prefix='', dtype=np.float32, **changes):
    tensors = {name: array.astype(dtype) for name, array in resnet_weights.draw(depth, classes).items()}
    tensors = {prefix + name: array for name, array in (tensors | changes).items() if name not in remove}
    (tmp_path / 'a').write_bytes(safetensors_bytes(tensors))
    return tmp_path / 'a'

  return save


def leaves(variables):
  found = jax.tree_util.tree_leaves_with_path(variables)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in found}


def test_logits_are_those_of_pytorch(save):
  fields, variables = read_cifar_resnet(save(20, prefix='module.', **{'bn1.num_batches_tracked': np.array(7)}))
  assert fields == {
    **{'block': 'basic', 'shortcut_padding': 'both_sides', 'depth': 20, 'channels': 3, 'num_classes': 10},
  }
  (logits,) = jax.jit(ResNet(**fields).apply)(variables, resnet_weights.images())
  np.testing.assert_allclose(logits, np.load(FIXTURES / 'logits.npy'), rtol=0, atol=1e-4)


def test_every_variable_has_its_place(save):
  fields, variables = read_cifar_resnet(save(14, classes=7), exit_number=3)
  model = ResNet(**fields, exits='stages')
  expected = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
  expected = {
    path: leaf for path, leaf in leaves(expected).items() if not path.startswith(('params/exit_1', 'params/exit_2'))
  }
  found = leaves(variables)
  assert found.keys() == expected.keys()
  for path, leaf in found.items():
    assert (leaf.shape, leaf.dtype) == (expected[path].shape, np.float32), path
  drawn = resnet_weights.draw(14, 7)
  np.testing.assert_array_equal(found['params/exit_3/classifier/kernel'], drawn['linear.weight'].T)
  np.testing.assert_array_equal(
    found['params/stage_2_block_1/conv1/conv/kernel'][2, 1, 5, 3], drawn['layer2.0.conv1.weight'][3, 5, 2, 1]
  )
  np.testing.assert_array_equal(found['batch_stats/stage_3_block_2/norm2/var'], drawn['layer3.1.bn2.running_var'])


@pytest.mark.parametrize('dtype', [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_precisions_become_float32(save, dtype):
  backbone = leaves(read_backbone(save(dtype=dtype), 8))
  expected = resnet_weights.draw(8)['bn1.bias'].astype(dtype).astype(np.float32)
  np.testing.assert_array_equal(backbone['params/stem/norm/bias'], expected, strict=True)


def test_a_classifier_of_another_name_or_none(save):
  drawn = resnet_weights.draw(8)
  removed = ('linear.weight', 'linear.bias')
  path = save(remove=removed, **{'fc.weight': drawn['linear.weight'], 'fc.bias': drawn['linear.bias']})
  _, variables = read_cifar_resnet(path)
  np.testing.assert_array_equal(variables['params']['exit_1']['classifier']['kernel'], drawn['linear.weight'].T)
  assert 'exit_1' not in read_backbone(save(remove=removed), 8)['params']


def test_the_published_depths_have_tables():
  for depth, tensors in ((20, 95), (32, 155), (44, 215), (56, 275), (110, 545)):
    assert len(backbone_table(depth)) == tensors == len(resnet_weights.shapes(depth)) - 2


STEM = resnet_weights.draw(8)['conv1.weight']
FITS = 'set --config.model.depth or --config.init_from'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'depth': 14},
      'does not fit ResNet-8: tensors 30 unknown (layer1.1.bn1.bias, layer1.1.bn1.running_mean, '
      f'layer1.1.bn1.running_var, layer1.1.bn1.weight, layer1.1.bn2.bias, ...); it fits depth 14, {FITS}',
    ),
    (
      {'remove': ('bn1.bias', 'conv1.weight'), 'stem.weight': STEM},
      'does not fit ResNet-8: tensors 1 unknown (stem.weight); 2 missing (conv1.weight, bn1.bias); '
      f'the nearest is depth 8, {FITS}',
    ),
    (
      {'conv1.weight': STEM[:, :1], 'bn1.bias': np.zeros(16, np.int64)},
      'does not fit ResNet-8: tensors 2 of another shape or type (conv1.weight [16, 1, 3, 3] instead of '
      f'[16, 3, 3, 3], bn1.bias int64 [16] instead of [16]); the nearest is depth 8, {FITS}',
    ),
    (
      {'a\nb\x1b' + 'c' * 100: STEM},
      f'does not fit ResNet-8: tensors 1 unknown (a\\nb\\x1b{"c" * 72}); the nearest is depth 8, {FITS}',
    ),
    ({'bn1.bias': np.full(16, np.nan, np.float32)}, 'has NaN or infinity in 1 tensors (bn1.bias); name another file'),
  ],
)
def test_what_does_not_fit_is_named(save, changes, message):
  path = save(**changes)
  with pytest.raises(UserError) as error:
    read_backbone(path, 8)
  assert str(error.value) == f'{path} {message}'


@pytest.mark.parametrize('name', ['layer2.0.shortcut.0.weight', 'layer2.0.downsample.0.weight'])
def test_shortcuts_with_parameters_are_refused(save, name):
  path = save(**{name: np.zeros((32, 16, 1, 1), np.float32)})
  with pytest.raises(UserError) as error:
    read_backbone(path, 8)
  assert str(error.value) == (
    f'expected a CIFAR ResNet whose shortcuts have no parameters (option A), and {path} has 1 of them ({name}, ...); '
    'name weights of one without'
  )


def test_a_classifier_that_does_not_fit(save):
  path = save(remove=['linear.bias'])
  with pytest.raises(UserError) as error:
    read_cifar_resnet(path)
  assert str(error.value) == (
    f'{path} does not fit the classifier of ResNet-8: tensors 1 missing (linear.bias); '
    '1 of another shape or type (linear.weight [10, 64] instead of [0, 64]); name another file'
  )


@pytest.mark.skipif(not REAL.is_dir(), reason='needs the trained CIFAR ResNets in ../cifar_resnets of PARANET_DATA_DIR')
@pytest.mark.parametrize('depth', [20, 56])
def test_the_trained_networks(depth):
  fields, variables = read_cifar_resnet(REAL / f'resnet{depth}.th')
  assert (fields['depth'], fields['num_classes']) == (depth, 10)
  count = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  assert round(count / 1e6, 2) == {20: 0.27, 56: 0.85}[depth]  # Table 6 of He et al. (2016a).
