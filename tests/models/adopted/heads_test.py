"""Heads of copied blocks: which of the network's own they have, and what those compute as copies."""

import jax
import numpy as np
import pytest
import resnet_weights
import small_architectures

from paranet_jax.costs import abstract_variables
from paranet_jax.host.errors import UserError
from paranet_jax.models.adopted.architecture import Mode
from paranet_jax.models.adopted.cifar_resnet import architecture
from paranet_jax.models.adopted.heads import HEADS
from paranet_jax.models.adopted.network import AdoptedNetwork
from paranet_jax.models.adopted.registry import ARCHITECTURES
from paranet_jax.models.adopted.tensors import tensor_table
from paranet_jax.weights.state_dict import to_variables


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.setattr(
    ARCHITECTURES, 'known', dict.fromkeys(('cifar_resnet8', 'cifar_resnet14', 'cifar_resnet26'), architecture)
  )


def modules_of(number, **fields):
  side = fields.pop('image_side', 32)
  model = AdoptedNetwork(10, side, head='blocks', **fields)
  return set(abstract_variables(model, (side, side, 3))['params'][f'exit_{number}']['blocks'])


def test_what_changes_the_shape_and_the_last_block_are_copied(tiny):
  fields = {'arch': 'cifar_resnet14', 'exits': ('layer1.0', 'layer2.0', 'layer3.0')}
  assert modules_of(1, **fields) == {'layer2.0', 'layer3.0', 'layer3.1', 'linear'}
  assert modules_of(2, **fields) == {'layer3.0', 'layer3.1', 'linear'}
  assert modules_of(3, **fields) == {'layer3.1', 'linear'}
  # Two blocks do not change the shape and come after one that does: the first is added, so that there are three.
  longer = {'arch': 'cifar_resnet26', 'exits': ('layer1.0', 'layer2.2', 'layer3.0')}
  assert modules_of(1, **longer) == {'layer2.0', 'layer3.0', 'layer3.3', 'linear'}
  assert modules_of(2, **longer) == {'layer3.0', 'layer3.1', 'layer3.3', 'linear'}
  assert modules_of(3, **longer) == {'layer3.3', 'linear'}


def test_more_blocks_of_each_shape_are_copied(tiny):
  fields = {'arch': 'cifar_resnet26', 'exits': ('layer1.0', 'layer2.2', 'layer3.0')}
  assert modules_of(1, copies=1, **fields) == {'layer2.0', 'layer3.0', 'layer3.3', 'linear'}
  assert modules_of(2, copies=1, **fields) == {'layer3.0', 'layer3.3', 'linear'}
  three = {'layer3.0', 'layer3.1', 'layer3.3', 'linear'}
  assert modules_of(1, copies=3, **fields) == three | {f'layer2.{number}' for number in range(3)}
  assert modules_of(2, copies=3, **fields) == three
  every = {f'layer{group}.{number}' for group in (2, 3) for number in range(4)}
  assert modules_of(1, copies=9, **fields) == every | {'linear'}
  assert modules_of(3, copies=9, **fields) == {'layer3.3', 'linear'}


def test_tokens_keep_their_shape_and_so_only_the_last_block_is_copied(monkeypatch):
  small = small_architectures.register(monkeypatch, 'vit')
  fields = {'arch': small.name, 'exits': small.places[:1], 'image_side': 32}
  assert modules_of(1, **fields) == {small.places[-1], 'norm', 'head'}


@pytest.mark.parametrize(
  ('name', 'head', 'message'),
  [
    ('vit', 'conv', "head 'conv' needs features of height and width, found tokens; set --config.model.head"),
    (
      'resnet',
      'class_token',
      "head 'class_token' needs tokens, found features of height and width; set --config.model.head",
    ),
  ],
)
def test_a_head_that_cannot_read_the_features(monkeypatch, name, head, message):
  small = small_architectures.register(monkeypatch, name)
  model = AdoptedNetwork(10, 32, arch=small.name, exits=small.places[:1], head=head)
  with pytest.raises(UserError) as error:
    abstract_variables(model, (32, 32, 3))
  assert str(error.value) == message


@pytest.mark.parametrize('places', [(4, 4), (9,)])
def test_the_head_of_the_paper(places):
  """Of features with height and width, and of tokens."""
  rng = np.random.default_rng(0)
  x, head = rng.normal(size=(2, *places, 3)).astype(np.float32), HEADS['bn_relu'](5)
  scale, bias, mean, kernel, last = (rng.normal(size=shape).astype(np.float32) for shape in (3, 3, 3, (3, 5), 5))
  var = rng.uniform(0.5, 2, 3).astype(np.float32)
  params = {'norm': {'scale': scale, 'bias': bias}, 'classifier': {'kernel': kernel, 'bias': last}}
  found = head.apply({'params': params, 'batch_stats': {'norm': {'mean': mean, 'var': var}}}, head.read(x), Mode())
  normed = np.maximum((x - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)
  np.testing.assert_allclose(found, normed.reshape(2, -1, 3).mean(1) @ kernel + last, rtol=1e-4, atol=1e-5)


def test_copies_of_all_that_follows_compute_the_own_logits(tiny):
  model = AdoptedNetwork(10, 32, arch='cifar_resnet8', exits=('layer1',), head='blocks')
  own = AdoptedNetwork(10, 32, arch='cifar_resnet8')
  variables = to_variables(resnet_weights.draw(8), tensor_table(abstract_variables(own, (32, 32, 3))))
  names = ('layer2.0', 'layer3.0', 'linear')
  variables = {
    part: modules | {'exit_1': {'blocks': {name: modules[name] for name in names if name in modules}}}
    for part, modules in variables.items()
  }
  early, last = jax.jit(model.apply)(variables, resnet_weights.images())
  np.testing.assert_allclose(early, last, rtol=0, atol=1e-6)
