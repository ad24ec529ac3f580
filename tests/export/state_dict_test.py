"""The weights go back to PyTorch's names bit for bit."""

import jax
import numpy as np
import pytest
import resnet_weights
import tiny
from safetensors.numpy import load_file
from tensor_files import safetensors_bytes

from paranet_jax import config as config_lib
from paranet_jax.early.loaded_run import LoadedRun
from paranet_jax.export.state_dict import pytorch_tensors, save_state_dict
from paranet_jax.models.adopted.read_weights import read_weights
from paranet_jax.models.adopted.registry import find_architecture
from paranet_jax.runs.dataset_facts import DatasetFacts
from paranet_jax.weights.cifar_resnet import read_cifar_resnet


def run_of(config, variables):
  facts = DatasetFacts('own', '', tuple('abcdefghij'), (0.5,) * 3, (0.25,) * 3, {})
  model = config_lib.build_model(config, 10)
  fresh = tiny.filled(jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)))
  filled = {part: dict(fresh[part]) | variables[part] for part in fresh}  # Exits that PyTorch does not know.
  return LoadedRun(model, filled, config, 1, facts)


def check(run, drawn, tmp_path):
  save_state_dict(tmp_path / 'back', pytorch_tensors(run))
  back = load_file(tmp_path / 'back')
  assert back.keys() == drawn.keys()
  for name, tensor in drawn.items():
    np.testing.assert_array_equal(back[name], tensor, strict=True)


@pytest.fixture
def weights(tmp_path):
  drawn = resnet_weights.draw(20)
  (tmp_path / 'weights').write_bytes(safetensors_bytes(drawn))
  return tmp_path / 'weights', drawn


def test_an_adopted_network(weights, tmp_path):
  config = tiny.base_config('small', 'adopted')
  config.model.update({'arch': 'cifar_resnet20', 'exits': 'layer1,layer2.1'})
  variables = read_weights(weights[0], find_architecture('cifar_resnet20'))
  check(run_of(config, variables), weights[1], tmp_path)


def test_a_cifar_resnet_of_this_package(weights, tmp_path):
  config = tiny.base_config('small', 'resnet')
  config.model.update({'depth': 20, 'shortcut_padding': 'both_sides', 'exits': 'stages'})
  _, variables = read_cifar_resnet(weights[0], exit_number=3)
  check(run_of(config, variables), weights[1], tmp_path)


@pytest.mark.parametrize(
  ('family', 'fields'),
  [
    *(('paranet', {}), ('resnet', {}), ('msdnet', {})),
    # The answer of the last exit is not that of its classifier alone.
    *(('adopted', {'boost': 0.5}), ('resnet', {'shortcut_padding': 'both_sides', 'transfer': 8})),
  ],
)
def test_what_pytorch_does_not_have(family, fields):
  config = tiny.base_config('PN3-ddd' if family == 'paranet' else 'small', family)
  config.model.update(fields)
  facts = DatasetFacts('own', '', tuple('ab'), (0.5,) * 3, (0.25,) * 3, {})
  assert pytorch_tensors(LoadedRun(None, {}, config, 1, facts)) is None
