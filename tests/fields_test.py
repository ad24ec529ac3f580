"""Every field of the configuration has its documented effect."""

import zlib

import jax
import numpy as np
import optax
import pytest
import tiny
from PIL import Image

from paranet_jax import config as config_lib
from paranet_jax import devices as devices_lib
from paranet_jax import evaluation, train
from paranet_jax import task as task_lib
from paranet_jax.base_config import base_config, field_names
from paranet_jax.costs import describe
from paranet_jax.data import stream
from paranet_jax.data.augment import image_keys
from paranet_jax.display.metrics import read_metrics
from paranet_jax.host.errors import UserError
from paranet_jax.host.processes import Coordinator
from paranet_jax.losses import exit_losses, total_loss
from paranet_jax.runs.record import open_record
from paranet_jax.seeds import seed_configs
from paranet_jax.steps import TrainState, augmented, zero_totals
from paranet_jax.task import build_task

# 1,437 training images in batches of 400 are 3 steps an epoch, 6 in all.
SMALL = {
  'name': 'PN1-d',
  'model.layers_per_block': 1,
  'model.growth_rate': 2,
  'model.image_side': 8,
  'data.name': 'digits',
  'train.batch_size': 400,
  'train.epochs': 2.0,
  'train.devices': 1,
  'checkpoint.every_steps': 2,
  'log.every_steps': 2,
}


@pytest.fixture(scope='module', autouse=True)
def _folders_of_images(tmp_path_factory):
  here = tmp_path_factory.mktemp('images')
  for folder, shade in (('first', 50), ('second', 200)):
    for label in ('cat', 'dog'):
      (here / folder / label).mkdir(parents=True)
      for number in range(6):
        image = Image.new('RGB', (8, 8), (shade, 10 * number, 0))
        image.putpixel((4, 4), (0, 0, 255))
        image.save(here / folder / label / f'{number}.png')
  (here / 'second' / 'cat' / '0.png').write_bytes(b'no picture')
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(here)
    yield


def costs(config, _):
  """Shapes and costs of the exits."""
  description = describe(config)
  return description['image_shape'], description['exits']


def logits(config, _):
  """Logits for random images and parameters."""
  model = config_lib.build_model(config, 3)
  images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
  return jax.jit(model.apply)(tiny.variables(model), images)[0].tolist()


def loops(config, _):
  """Number of loops and random draws in a training forward pass."""
  model = config_lib.build_model(config, 3)
  images = np.zeros((2, 8, 8, 3), np.float32)
  options = {'train': True, 'mutable': ['batch_stats'], 'rngs': {'dropout': jax.random.key(0)}}
  program = str(jax.make_jaxpr(lambda: model.apply(tiny.variables(model), images, **options))())
  return program.count('scan['), program.count('random_bits[')


def start(config, _):
  """The state before the first step."""
  return jax.tree.map(np.ndarray.tolist, jax.device_get(build_task(config).init_state()))


def own_runs(config, _):
  """The seeds that a run trains."""
  return [own.seed for own in seed_configs(config)]


def beginning(config, workdir):
  """The initial state of a run, or the error."""
  task, devices = build_task(config), jax.devices()[:1]
  workdir.mkdir()
  with open_record(task, workdir, Coordinator()) as record:
    try:
      state = record.restore(devices)
    except UserError as error:
      return str(error)
  return jax.tree.map(np.ndarray.tolist, jax.device_get(state))


def phases(config, _):
  """The phases of a run."""
  return build_task(config).phases


def program(config, _):
  """What a training step computes."""
  task = build_task(config)
  arguments = tiny.state(task.model, task.optimizer), zero_totals(task.targets), task.dataset.train.images
  step = task.train_step()
  return str(jax.make_jaxpr(step)(*arguments, task.dataset.train.labels, np.zeros((1, 4), np.int32)))


def beside(config, _):
  """What a training step computes from a state with averages of its weights or a teacher."""
  task = build_task(config)
  state = jax.eval_shape(task.init_state)
  arguments = state, zero_totals(task.targets), task.dataset.train.images, task.dataset.train.labels
  return str(jax.make_jaxpr(task.train_step())(*arguments, np.zeros((1, 4), np.int32)))


def kept(config, _):
  """Shapes and types of the kept features of a frozen backbone, and what a training step computes from them."""
  task = build_task(config)
  features = task.feature_shapes(task.dataset.train)
  totals = zero_totals(task.phases[-1].targets)
  arguments = jax.eval_shape(task.init_state), totals, features, task.dataset.train.labels
  return str(features), str(jax.make_jaxpr(task.train_step())(*arguments, np.zeros((1, 4), np.int32)))


def batch(config, _):
  """Images and labels as a training step reads them."""
  task = build_task(config)
  train = task.dataset.train

  @jax.jit
  def read(images, labels):
    return augmented(image_keys(0, 0, 0, np.arange(4)), images, labels, task.preprocessing, 10)

  return [values.tolist() for values in read(train.images[:4], train.labels[:4])]


def augmentation(config, _):
  """What reads the images and labels of a training step."""
  task = build_task(config)
  train = task.dataset.train

  def read(images, labels):
    return augmented(image_keys(0, 0, 0, np.arange(4)), images, labels, task.preprocessing, 10)

  return str(jax.make_jaxpr(read)(train.images[:4], train.labels[:4]))


def dataset(config, _):
  """Contents and augmentation of the splits, or the error."""
  try:
    data = build_task(config).dataset
  except UserError as error:
    return str(error)
  splits = [
    split and (len(split), zlib.crc32(np.ascontiguousarray(split.images)))
    for split in (data.train, data.held_out, data.test)
  ]
  return data.name, data.class_names, splits, data.crop_padding, data.flip, data.skipped


def reading(config, _):
  """Whether images are streamed, and with how many workers."""
  seen = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stream, 'num_workers', lambda asked: seen.append(asked) or 0)
    return build_task(config).dataset.train.streamed, seen


def objective(config, _):
  """The total loss of fixed logits."""
  found = build_task(config).objective._asdict()
  targets, weights, _ = (found.pop(name) for name in ('targets', 'exit_weights', 'teacher'))
  values = np.random.default_rng(0).normal(size=(len(targets), 4, 10)).astype(np.float32)
  return float(total_loss(exit_losses(values, np.arange(4), targets, **found), weights))


def updates(config, _):
  """The parameters of an exit after six updates with the same gradient."""
  task = build_task(config)
  params = {'exit_1': tiny.variables(task.model)['params']['exit_1']}
  gradient = jax.tree.map(np.ones_like, params)

  def update(carry, _):
    params, state = carry
    change, state = task.optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, change), state), None

  (params, _), _ = jax.jit(lambda: jax.lax.scan(update, (params, task.optimizer.init(params)), None, 6))()
  return jax.tree.map(np.ndarray.tolist, jax.device_get(params))


def run(config, workdir):
  """Steps logged, evaluated and saved, devices and batch sizes, in a run without a network."""
  seen = []

  def run_on(devices, *_):
    seen.append(len(devices))
    return lambda state, totals, *_: (state.replace(step=state.step + 1), totals)

  def eval_batches(count, size):
    seen.append(size)
    return batches(count, size)

  batches = evaluation.eval_batches
  nothing = {'exit': 1, 'trained': True} | dict.fromkeys(evaluation.MEASURES, 0.0) | {'confusion': None}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(devices_lib, 'run_on', run_on)
    patch.setattr(evaluation, 'eval_batches', eval_batches)
    patch.setattr(evaluation.Evaluator, 'evaluate', lambda *_: {'test': [nothing]})
    patch.setattr(task_lib, 'init_state', lambda *_: TrainState(np.int32(0), np.int32(0), np.zeros(1), {}, {}))
    patch.setattr(train, 'draw_curves', lambda _: None)
    train.train_and_evaluate(config, workdir)
  lines = [(line['step'], line['split']) for line in read_metrics(workdir)]
  return lines, sorted(path.name for path in (workdir / 'checkpoints').iterdir()), seen


FOLDER = {'data.name': 'folder', 'data.data_dir': 'first', 'train.batch_size': 2}
MATCHING = {'name': 'PN2-2d'}
EXITS = {
  'model.family': 'resnet',
  'model.depth': 8,
  'model.exits': 'stages',
  'train.regime': 'exits',
  'init_from': 'run',
}
EXITS |= {'data.crop_padding': 0}  # Otherwise features are not kept.
KL = MATCHING | {'loss.matching': 'kl'}

# field: what it changes, its new value, what else is set
FIELDS = {
  'name': (costs, 'PN2-dd', {}),
  'seed': (start, 1, {}),
  'seeds': (own_runs, 2, {}),
  'init_from': (beginning, 'no run', {}),
  'model.layers_per_block': (costs, 2, {}),
  'model.growth_rate': (costs, 3, {}),
  'model.growth_factors': (costs, (2,), {}),
  'model.bn_size': (costs, 2, {}),
  'model.blocks': (costs, (2,), {}),
  'model.halvings': (costs, (2,), {}),
  'model.cascade': (costs, '', {'name': 'PN2-dd'}),
  'model.stem_norm': (costs, True, {}),
  'model.stem': (costs, '7x7', {}),
  'model.entry_pool': (logits, 'avg', {}),
  'model.entry_order': (logits, 'pool_first', {}),
  'model.dropout': (loops, 0.1, {'model.scan_layers': 1}),
  'model.num_classes': (costs, 12, {}),
  'model.image_side': (costs, 16, {}),
  'model.channels': (costs, 1, {}),
  'model.dtype': (logits, 'bfloat16', {}),
  'model.boost': (costs, 0.5, {'name': 'PN2-dd'}),
  'model.transfer': (costs, 5, {'name': 'PN2-dd'}),
  'model.scan_layers': (loops, 1, {'model.layers_per_block': 2}),
  'data.name': (dataset, 'folder', FOLDER | {'data.name': 'digits'}),
  'data.data_dir': (dataset, 'second', FOLDER | {'data.on_corrupt': 'skip'}),
  'data.held_out': (dataset, 100, {}),
  'data.test_fraction': (dataset, 0.5, FOLDER),
  'data.on_corrupt': (dataset, 'skip', FOLDER | {'data.data_dir': 'second'}),
  'data.short_side': (dataset, 9, FOLDER),
  'data.interpolation': (dataset, 'bicubic', FOLDER | {'data.short_side': 9}),
  'data.crop_padding': (dataset, 3, {}),
  'data.flip': (dataset, True, {}),
  'data.streaming': (reading, True, {}),
  'data.workers': (reading, 1, {'data.streaming': True}),
  'loss.matching': (objective, 'kl', MATCHING),
  'loss.match_scale': (objective, 'half_sum', MATCHING),
  'loss.match_centered': (objective, True, MATCHING),
  'loss.match_mirrored': (kept, True, EXITS | {'data.flip': True}),
  'loss.match_features': (
    kept,
    1.0,
    EXITS
    | {'model.family': 'adopted', 'model.arch': 'cifar_resnet20', 'model.exits': 'layer2', 'model.head': 'blocks'},
  ),
  'loss.match_from_epoch': (phases, 1.0, MATCHING),
  'loss.match_before': (phases, 'nothing', MATCHING | {'loss.match_from_epoch': 1.0}),
  'loss.teacher': (beside, 'average', MATCHING | {'train.average': 0.9}),
  'loss.teacher_run': (beginning, 'no run', MATCHING | {'loss.teacher': 'run', 'loss.teacher_run': 'none'}),
  'loss.temperature': (objective, 2.0, KL),
  'loss.hard_label_weight': (objective, 0.5, KL),
  'loss.distill': (objective, 'last', {'name': 'PN2-dd'}),
  'loss.gradient_equilibrium': (program, True, {'name': 'PN2-dd'}),
  'loss.conflict_averse': (program, 0.4, {'name': 'PN2-dd'}),
  'loss.own_channels': (program, 0.5, {'name': 'PN2-dd'}),
  'loss.sample_weight': (objective, 0.3, {'name': 'PN2-dd'}),
  'loss.leaving': (objective, 3.0, {'name': 'PN2-dd', 'loss.sample_weight': 0.3}),
  'loss.exit_weights': (objective, (2.0,), {}),
  'loss.label_smoothing': (objective, 0.1, {}),
  'loss.class_weights': (objective, '1,2,1,1,1,1,1,1,1,1', {}),
  'train.epochs': (run, 3.0, {}),
  'train.max_steps': (run, 5, {}),
  'train.regime': (phases, 'mixed', {'name': 'PN2-dd'}),
  'train.exit_targets': (phases, 'labels', EXITS),
  'train.features': (kept, 'float16', EXITS),
  'train.feature_shift': (kept, 0.5, EXITS),
  'train.backbone_epochs': (phases, 0.5, {'name': 'PN2-dd', 'train.regime': 'mixed'}),
  'train.batch_size': (run, 700, {}),
  'train.learning_rate': (updates, 0.2, {}),
  'train.schedule': (updates, 'constant', {}),
  'train.drops': (updates, (0.5,), {}),
  'train.drop_epochs': (updates, (1,), {}),
  'train.drop_factor': (updates, 0.5, {}),
  'train.warmup_epochs': (updates, 1.0, {}),
  'train.optimizer': (updates, 'adamw', {}),
  'train.momentum': (updates, 0.5, {}),
  'train.nesterov': (updates, False, {}),
  'train.weight_decay': (updates, 0.1, {}),
  'train.decay': (updates, 'kernels', {}),
  'train.decoupled_decay': (updates, True, {'train.weight_decay': 0.1}),
  'train.norm_bias_factor': (updates, 2.0, {}),
  'train.average': (beside, 0.5, {}),
  'train.clip_norm': (updates, 0.1, {}),
  'train.accumulate_steps': (updates, 2, {}),
  'train.cutout': (batch, 4, {}),
  'train.mixup': (batch, 1.0, {}),
  'train.cutmix': (batch, 1.0, {}),
  'train.alternate_flip': (program, True, {'data.flip': True}),
  'train.auto_augment': (augmentation, 'trivial', {}),
  'train.rand_augment_operations': (augmentation, 3, {'train.auto_augment': 'rand'}),
  'train.rand_augment_magnitude': (augmentation, 20, {'train.auto_augment': 'rand'}),
  'train.devices': (run, 2, {}),
  'eval.every_epochs': (run, 2.0, {}),
  'eval.batch_size': (run, 90, {}),
  'checkpoint.every_steps': (run, 3, {}),
  'checkpoint.keep': (run, 1, {}),
  'checkpoint.keep_every_epochs': (run, 0.5, {}),
  'checkpoint.keep_best': (run, 'nll', {'data.held_out': 100, 'checkpoint.every_steps': 6}),
  'log.every_steps': (run, 3, {}),
}


def test_every_field_is_in_the_table():
  # The family determines the other fields: see models/registry_test.py.
  assert FIELDS.keys() == set(field_names(base_config())) - {'model.family'}


def observed(observe, fields, folder):
  config = base_config(family=fields.get('model.family', 'paranet'))
  known = field_names(config)  # SMALL also has fields of the family paranet.
  config.update_from_flattened_dict({name: value for name, value in fields.items() if name in known})
  return observe(config, folder)


@pytest.mark.parametrize('observe', [costs, logits, start, dataset, objective, updates, run])
def test_equal_fields_give_equal_observations(observe, tmp_path, standard_promotion):
  assert observed(observe, SMALL, tmp_path / 'once') == observed(observe, SMALL, tmp_path / 'again')


@pytest.fixture(scope='module')
def unchanged():
  """Observations without the change, by observer and other fields."""
  return {}


@pytest.mark.parametrize('field', FIELDS)
def test_every_field_has_an_effect(field, tmp_path, unchanged, standard_promotion):
  observe, value, given = FIELDS[field]
  key = observe, repr(given)
  if key not in unchanged:
    unchanged[key] = observed(observe, SMALL | given, tmp_path / 'before')
  assert unchanged[key] != observed(observe, SMALL | given | {field: value}, tmp_path / 'after')
