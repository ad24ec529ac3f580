"""A small network of every kind as a run to export, whose images exit at every exit."""

import copy
import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from paranet_jax import config as config_lib
from paranet_jax.base_config import base_config
from paranet_jax.early.chunks import Sizes
from paranet_jax.early.exit_plan import CheckpointId, full_network_plan, with_thresholds
from paranet_jax.early.loaded_run import LoadedRun
from paranet_jax.early.logits import bundle_logits
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.early.runtime import EarlyExit
from paranet_jax.early.scores import confidences
from paranet_jax.export import bundle as bundle_lib
from paranet_jax.export import contents as contents_lib
from paranet_jax.export.onnx import onnx_stage
from paranet_jax.models.ensemble import Ensemble
from paranet_jax.models.staged import StagedModel
from paranet_jax.portable import run as runtime
from paranet_jax.runs.dataset_facts import DatasetFacts

CLASSES = 5
SIDE = 8
MEAN, STD = tiny.PLAIN.mean, tiny.PLAIN.std
COUNT = 12
SIZES = Sizes((COUNT,), split=False, wave=COUNT, on_host=True)
# One color each, so that they differ after pooling.
IMAGES = np.random.default_rng(3).integers(0, 256, (COUNT, 1, 1, 3), np.uint8).repeat(SIDE, 1).repeat(SIDE, 2)
NORMALIZED = (IMAGES / np.float32(255) - np.float32(MEAN)) / np.float32(STD)


class Stage(nn.Module):
  """A stage of a user's own backbone."""

  features: int

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(self.features, (3, 3), strides=2, use_bias=False)(x)
    return nn.relu(nn.BatchNorm(use_running_average=not train)(x))


def of_family(family, **fields):
  return config_lib.build_model(tiny.small(family, **fields), CLASSES)


MODELS = {
  'paranet': lambda: tiny.network(3, num_classes=CLASSES),
  'paranet cut': lambda: tiny.network(2, num_classes=CLASSES, cascade=False, dtype=jnp.bfloat16),
  'paranet for ImageNet': lambda: tiny.network(
    2, num_classes=CLASSES, stem='7x7', stem_norm=True, entry_pool='max3x3', halvings=(1, 0)
  ),
  'paranet that pools first': lambda: tiny.network(2, num_classes=CLASSES, entry_pool='avg', entry_order='pool_first'),
  'densenet-bc': lambda: of_family('densenet', exits='blocks'),
  'densenet-mc without bottlenecks': lambda: of_family(
    'densenet', bottleneck=False, stem_channels=6, depth=10, exits='1'
  ),
  'resnet-mc': lambda: of_family('resnet', exits='stages'),
  'preact-resnet': lambda: of_family('resnet', block='preactivation', shortcut_padding='both_sides'),
  'resnet of bottlenecks': lambda: of_family('resnet', block='bottleneck', depth=11),
  'msdnet': lambda: of_family('msdnet'),
  'ranet': lambda: of_family('ranet', step=2),
  'boosted': lambda: of_family('resnet', exits='stages', boost=0.5),
  'with transfer': lambda: of_family('msdnet', transfer=3),
  'fractalnet': lambda: of_family('fractalnet'),
  'adopted': lambda: of_family('adopted', arch='cifar_resnet20', exits='layer1.0,layer2.0', head='conv'),
  'ensemble': lambda: Ensemble(
    [
      of_family('resnet', block='preactivation', shortcut_padding='both_sides'),
      tiny.network(2, num_classes=CLASSES),
    ]
  ),
  'own stages': lambda: StagedModel([Stage(4), Stage(6), Stage(8)], exits=(1, 3), num_classes=CLASSES),
}


QUICK = (
  *('paranet cut', 'densenet-mc without bottlenecks', 'msdnet', 'fractalnet', 'adopted', 'ensemble', 'own stages'),
)


def variables_of(model):
  """Random, with biases that make every exit's mean logits 0, so that labels differ between images and exits."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), NORMALIZED[:1]))
  variables = tiny.filled({'batch_stats': {}} | dict(shapes))

  def centered(path, leaf):
    return leaf - leaf.mean() if path[-1].key == 'bias' else leaf

  return jax.tree_util.tree_map_with_path(centered, variables)


_COSTS = {}


def costs_of(model, image_shape, exits):
  """`mac_costs`, which traces a model, once for each."""
  key = repr(model), exits
  if key not in _COSTS:
    _COSTS[key] = mac_costs(model, image_shape, exits)
  return _COSTS[key]


def made(model):
  """A run of the model, a plan with which its images exit at every exit, and all logits [K, N, C]."""
  variables = variables_of(model)
  model = model.clone(dtype=jnp.float32) if hasattr(model, 'dtype') else model
  exits = tuple(range(1, model.num_exits + 1))
  macs = costs_of(model, (SIDE, SIDE, 3), exits)
  plan = full_network_plan(CheckpointId('small', 'digits', 7, ''), exits, [int(cost) for cost in macs.alone()])
  plan = dataclasses.replace(plan, temperatures=tuple(np.linspace(1.5, 0.7, len(exits)).tolist()))
  logits = np.stack(jax.jit(model.apply)(variables, NORMALIZED))
  sure = confidences(logits, 'max_prob', plan.temperatures)
  left, thresholds = np.arange(COUNT), []
  for at_exit in sure[:-1]:  # Half of the rest exit; a threshold between two images does not depend on rounding.
    ranked = np.sort(at_exit[left])
    thresholds.append(ranked[len(left) // 2 - 1 : len(left) // 2 + 1].mean())
    left = left[at_exit[left] < thresholds[-1]]
  facts = DatasetFacts('digits', '1', tuple('abcde'), MEAN, STD, {'train': 1, 'held_out': 2, 'test': 3})
  run = LoadedRun(model, variables, base_config('PN3-ddd'), 7, facts)
  run.config.model.image_side = SIDE
  return run, with_thresholds(plan, np.array([*thresholds, -np.inf]), macs), logits


@functools.cache
def paranet():
  """What is `made` of a ParaNet of three exits, for all tests of a process; they may not change it."""
  return made(MODELS['paranet']())


_CONVERTED = {}


def write_paranet(out, plan):
  """Writes a bundle of `paranet` with a plan; each of its stages is converted once."""

  def converted(spec):
    if spec.name not in _CONVERTED:
      _CONVERTED[spec.name] = onnx_stage(spec)
    return copy.deepcopy(_CONVERTED[spec.name])

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bundle_lib, 'onnx_stage', converted)
    bundle_lib.write_bundle(bundle_lib.Request(out.parent, out, ('onnx',), 'float32'), paranet()[0], plan, IMAGES)


def early_exit(run, plan):
  """The JAX runtime."""
  model = run.model.clone(dtype=jnp.float32) if hasattr(run.model, 'dtype') else run.model
  return EarlyExit(model, run.variables, plan, (SIDE, SIDE, 3), MEAN, STD, tuple('abcde'), SIZES)


def assert_bundle_answers_as_the_jax_runtime(name, folder):
  """Exports a model and compares the logits, exits, labels and costs of both runtimes."""
  model = MODELS[name]()
  run, plan, logits = made(model)
  run = dataclasses.replace(run, model=model)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bundle_lib, 'compare', lambda *_: {'images': COUNT, 'labels': 1, 'exits': 1, 'logits': 0})
    patch.setattr(contents_lib, 'mac_costs', costs_of)
    for name in ('exit_costs', 'model_card'):  # Only the card needs the costs.
      patch.setattr(bundle_lib, name, lambda *_: '')
    bundle_lib.write_bundle(bundle_lib.Request(folder, folder / 'out', ('onnx',), 'float32'), run, plan, IMAGES)
  bundle = runtime.load(folder / 'out', threads=1)
  np.testing.assert_allclose(bundle_logits(bundle, IMAGES), logits, rtol=1e-4, atol=1e-4 * max(np.abs(logits).max(), 1))
  early = early_exit(run, plan)
  ours, theirs = early.predict(IMAGES), bundle.predict(IMAGES)
  for field in ('labels', 'exits', 'macs'):
    np.testing.assert_array_equal(getattr(theirs, field), getattr(ours, field))
  np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-4)
  assert len(set(ours.exits)) == len(plan.exits)
  anytime = list(bundle.anytime(IMAGES[0]))
  assert [answer.macs for answer in anytime] == json.loads((folder / 'out/bundle.json').read_text())['all_macs']
  np.testing.assert_array_equal([answer.label for answer in anytime], logits[:, 0].argmax(-1))
