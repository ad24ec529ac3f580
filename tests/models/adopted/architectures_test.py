"""Architectures compute PyTorch's logits, and their variables are PyTorch's tensors by one rule."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import resnet_weights
import small_architectures
from tensor_files import safetensors_bytes

from paranet_jax.costs import abstract_variables
from paranet_jax.host.errors import UserError
from paranet_jax.models.adopted import vit
from paranet_jax.models.adopted.architecture import Architecture
from paranet_jax.models.adopted.cifar_resnet import architecture
from paranet_jax.models.adopted.network import AdoptedNetwork, from_fields
from paranet_jax.models.adopted.read_weights import classes_of, read_weights
from paranet_jax.models.adopted.registry import (
  ARCHITECTURES,
  architecture_names,
  find_architecture,
  register_architecture,
)
from paranet_jax.models.adopted.tensors import renamed, tensor_table, to_state_dict
from paranet_jax.weights.state_dict import to_variables

FIXTURES = Path(__file__).resolve().parents[2] / 'fixtures' / 'pytorch'
TINY = ('cifar_resnet8', 'cifar_resnet14')


@pytest.fixture
def tiny(monkeypatch):
  """Two small architectures, and no others."""
  monkeypatch.setattr(ARCHITECTURES, 'known', dict.fromkeys(TINY, architecture))


@pytest.fixture
def save(tmp_path):
  def save(depth, classes=10, **changes):
    tensors = resnet_weights.draw(depth, classes) | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (tmp_path / 'a').write_bytes(safetensors_bytes(tensors))
    return tmp_path / 'a'

  return save


@functools.cache
def shapes(name, exits=()):
  return abstract_variables(AdoptedNetwork(arch=name, exits=exits), (32, 32, 3))


def test_logits_are_those_of_pytorch(save):
  path = save(20, **{'bn1.num_batches_tracked': np.array(7.0, np.float32)})
  variables = read_weights(path, find_architecture('cifar_resnet20'))
  (logits,) = jax.jit(AdoptedNetwork(arch='cifar_resnet20').apply)(variables, resnet_weights.images())
  np.testing.assert_allclose(logits, np.load(FIXTURES / 'logits.npy'), rtol=0, atol=1e-4)


def test_variables_are_the_tensors_of_pytorch(tiny):
  table = tensor_table(shapes('cifar_resnet14', ('layer1', 'layer2.0')))
  assert {entry.name: entry.shape for entry in table} == resnet_weights.shapes(14)
  drawn = resnet_weights.draw(14)
  variables = to_variables(drawn, table)
  np.testing.assert_array_equal(
    variables['params']['layer2.0']['conv1']['kernel'][2, 1, 5, 3], drawn['layer2.0.conv1.weight'][3, 5, 2, 1]
  )
  np.testing.assert_array_equal(variables['batch_stats']['bn1']['var'], drawn['bn1.running_var'])
  back = to_state_dict(variables)
  assert back.keys() == drawn.keys()
  for name, tensor in drawn.items():
    np.testing.assert_array_equal(back[name], tensor, strict=True)


def test_only_kernels_are_transposed():
  variables = {'params': {'exit_1': {'bias': np.zeros(1)}, 'cls_token': np.arange(6.0).reshape(1, 2, 3)}}
  assert [tuple(entry) for entry in tensor_table(variables)] == [('cls_token', (1, 2, 3), ('params', 'cls_token'))]
  np.testing.assert_array_equal(to_state_dict(variables)['cls_token'], variables['params']['cls_token'])


@pytest.mark.parametrize(
  ('place', 'position'), [('bn1', 1), ('layer1.0', 2), ('layer1', 3), ('layer2', 5), ('layer3.1', 7), ('layer3', 7)]
)
def test_places_are_modules_of_pytorch(tiny, place, position):
  found = find_architecture('cifar_resnet14')
  assert found.places == ('bn1', *(f'layer{group}.{block}' for group in (1, 2, 3) for block in (0, 1)))
  assert found.position(place) == position


PLACES = 'bn1, layer1.0, layer2.0, layer3.0'
ORDER = 'exits must be places of cifar_resnet8 in the order of its layers, before the last, layer3.0, found'


@pytest.mark.parametrize(
  ('exits', 'message'),
  [
    (('layer4',), f"expected a place of cifar_resnet8 ({PLACES}), found 'layer4'"),
    (('layer',), f"expected a place of cifar_resnet8 ({PLACES}), found 'layer'"),
    (('layer2', 'layer1'), f'{ORDER} layer2,layer1'),
    (('layer1', 'layer1.0'), f'{ORDER} layer1,layer1.0'),
    (('layer1', 'layer3'), f'{ORDER} layer1,layer3'),
  ],
)
def test_exits_elsewhere_are_refused(tiny, exits, message):
  with pytest.raises(ValueError) as error:
    AdoptedNetwork(arch='cifar_resnet8', exits=exits)
  assert str(error.value) == message


# ConvNeXt-Tiny halves a quarter of the side three times, and rounds down: of 31 pixels 7, 3, 1 and none are left.
@pytest.mark.parametrize(
  'arch, side, expected',
  [('deit_tiny_patch16_224', 100, 'a multiple of 16'), ('convnext_tiny', 31, '32 or more')],
)
def test_a_side_that_does_not_fit_is_refused(arch, side, expected):
  with pytest.raises(UserError) as error:
    from_fields('a', {'arch': arch, 'image_side': side})
  assert str(error.value) == (
    f'model.image_side must be {expected} for {arch}, found {side}; set --config.model.image_side'
  )


def test_the_least_side_leaves_a_pixel():
  model = from_fields('a', {'arch': 'convnext_tiny', 'image_side': 32, 'exits': ''})
  assert abstract_variables(model, (32, 32, 3))['params']['classifier.2']['kernel'].shape == (768, 10)


def test_an_unknown_architecture_is_refused():
  with pytest.raises(UserError) as error:
    find_architecture('cifar_resnet57')
  message = str(error.value)
  assert message.startswith('expected an architecture (cifar_resnet') and 'cifar_resnet56, ' in message
  assert message.endswith("found 'cifar_resnet57'; set --arch or --config.model.arch")


def test_a_registered_architecture_is_found(tiny):
  register_architecture('mine', lambda name: Architecture(name, build=lambda num_classes: None))
  assert architecture_names()[:3] == [*TINY, 'mine'] and find_architecture('mine').name == 'mine'


def test_the_file_says_how_many_classes_there_are(tiny, save):
  drawn = resnet_weights.draw(8, 7)
  renamed = {'linear.weight': None, 'linear.bias': None, 'fc.weight': drawn['linear.weight']}
  variables = read_weights(save(8, 7, **renamed, **{'fc.bias': drawn['linear.bias']}), architecture('cifar_resnet8'))
  np.testing.assert_array_equal(variables['params']['linear']['kernel'], drawn['linear.weight'].T)


@pytest.mark.parametrize(
  ('changes', 'unknown'),
  [
    ({'fc.weight': np.zeros((10, 64), np.float32)}, '1 unknown (fc.weight)'),
    ({'module.linear.bias': np.zeros(10, np.float32)}, '1 unknown (module.linear.bias)'),
    (
      {'linear.bias': None, 'module.fc.bias': np.zeros(10, np.float32), 'fc.bias': np.ones(10, np.float32)},
      '1 unknown (module.fc.bias)',
    ),
    (
      {
        'bn1.bias': None,
        'module.bn1.bias': np.zeros(16, np.float32),
        'module.module.bn1.bias': np.ones(16, np.float32),
      },
      '1 unknown (module.module.bn1.bias)',
    ),
  ],
)
def test_of_two_tensors_of_one_name_none_is_dropped(tiny, save, changes, unknown):
  path = save(8, **changes)
  with pytest.raises(UserError) as error:
    read_weights(path, architecture('cifar_resnet8'))
  assert str(error.value) == (
    f'{path} does not fit cifar_resnet8 of 10 classes: tensors {unknown}; the nearest is cifar_resnet8: name its '
    'weights, or set --arch'
  )


def test_two_tensors_that_get_one_name_both_keep_theirs():
  given = {'a.x': 0, 'b.x': 1, 'd.x': 2}
  assert renamed(given, ((r'^[ab]\.', 'c.'), (r'^d\.', 'e.'))) == {'a.x': 0, 'b.x': 1, 'e.x': 2}


def test_tokens_and_positions_are_drawn_as_in_timm(monkeypatch):
  small = small_architectures.register(monkeypatch, 'vit')
  model = AdoptedNetwork(10, 32, arch=small.name, exits=small.places[:1])
  shapes = abstract_variables(model, (32, 32, 3))
  first, same, other = (model.initial_variables(shapes, seed)['params'] for seed in (0, 0, 1))
  drawn = [
    {path[-1].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if leaf.ndim == 3}
    for params in (first, same, other)
  ]
  assert {name: leaf.shape for name, leaf in drawn[0].items()} == {'cls_token': (1, 1, 128), 'pos_embed': (1, 5, 128)}
  for name, leaf in drawn[0].items():
    np.testing.assert_array_equal(leaf, drawn[1][name])
    assert (leaf != drawn[2][name]).all() and np.std(leaf) == pytest.approx(0.02, rel=0.15)
  assert (first['norm']['scale'] == 1).all() and (first['norm']['bias'] == 0).all()


@pytest.mark.parametrize(
  ('kind', 'name', 'value'),
  [('convnext', 'layer_scale', 1e-6), ('vit', 'attn.qkv.bias', 0), ('vit_of_torchvision', 'in_proj_bias', 0)],
)
def test_scales_and_biases_start_as_in_pytorch(monkeypatch, kind, name, value):
  torchvision = {'vit_of_torchvision': lambda classes: vit.parts(2, 128, vit.TORCHVISION, classes)}
  monkeypatch.setattr(small_architectures, 'SMALL', small_architectures.SMALL | torchvision)
  small = small_architectures.register(monkeypatch, kind)
  model = AdoptedNetwork(10, 32, arch=small.name, exits=small.places[:1])
  both = (
    model.initial_variables(abstract_variables(model, (32, 32, 3)), 0)['params'],
    jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))['params'],
  )
  for params in both:
    leaves = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key.endswith(name)]
    assert leaves and all((leaf == np.float32(value)).all() for leaf in leaves)


def test_classes_of_a_file_without_a_classifier(tiny):
  found = architecture('cifar_resnet8')
  drawn = resnet_weights.draw(8, 7)
  assert classes_of(drawn, found) == 7
  for changed in ({}, {'linear.weight': np.zeros((1, 64))}, {'linear.weight': np.zeros(64)}):
    backbone = {name: tensor for name, tensor in drawn.items() if not name.startswith('linear')}
    assert classes_of(backbone | changed, found) == 10


def test_axes_of_size_1_do_not_matter(tiny, save):
  bias = resnet_weights.draw(8)['bn1.bias']
  variables = read_weights(save(8, **{'bn1.bias': bias.reshape(16, 1, 1)}), architecture('cifar_resnet8'))
  np.testing.assert_array_equal(variables['params']['bn1']['bias'], bias, strict=True)


STEM = resnet_weights.draw(8)['conv1.weight']


@pytest.mark.parametrize(
  ('depth', 'changes', 'message'),
  [
    (
      14,
      {},
      'does not fit cifar_resnet8 of 10 classes: tensors 30 unknown (layer1.1.bn1.bias, layer1.1.bn1.running_mean, '
      'layer1.1.bn1.running_var, layer1.1.bn1.weight, layer1.1.bn2.bias, ...); it fits cifar_resnet14: '
      'set --arch=cifar_resnet14',
    ),
    (
      8,
      {'bn1.bias': None, 'stem.weight': STEM, 'conv1.weight': STEM[:, :1]},
      'does not fit cifar_resnet8 of 10 classes: tensors 1 unknown (stem.weight); 1 missing (bn1.bias); '
      '1 of another shape or type (conv1.weight [16, 1, 3, 3] instead of [16, 3, 3, 3]); '
      'the nearest is cifar_resnet8: name its weights, or set --arch',
    ),
    (
      8,
      {'bn1.bias': np.full(16, np.inf, np.float32)},
      'has NaN or infinity in 1 tensors (bn1.bias); name another file',
    ),
  ],
)
def test_what_does_not_fit_is_named(tiny, save, depth, changes, message):
  path = save(depth, **changes)
  with pytest.raises(UserError) as error:
    read_weights(path, architecture('cifar_resnet8'))
  assert str(error.value) == f'{path} {message}'
