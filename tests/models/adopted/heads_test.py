"""Heads of copied blocks: which of the network's own they have, and what those compute as copies."""

import jax
import numpy as np
import pytest
import resnet_weights
import small_architectures

from paranet_jax.costs import abstract_variables
from paranet_jax.models.adopted.cifar_resnet import architecture
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


def test_tokens_keep_their_shape_and_so_only_the_last_block_is_copied(monkeypatch):
  small = small_architectures.register(monkeypatch, 'vit')
  fields = {'arch': small.name, 'exits': small.places[:1], 'image_side': 32}
  assert modules_of(1, **fields) == {small.places[-1], 'norm', 'head'}


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
