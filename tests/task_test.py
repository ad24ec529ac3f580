"""Tests of what a configuration and its data set determine, and of which exits each phase trains."""

import dataclasses
import signal
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
import small_architectures
import tiny
from running import PROGRAMS, TINY, before_each_step, refusal, run_main, saved_state, send

from paranet_jax import task as task_lib
from paranet_jax.base_config import base_config
from paranet_jax.config import validate
from paranet_jax.costs import variable_paths
from paranet_jax.data.identity import Learned
from paranet_jax.display.metrics import read_metrics
from paranet_jax.host.errors import UserError
from paranet_jax.host.processes import Coordinator
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.workdir import restore_config
from paranet_jax.steps import zero_totals
from paranet_jax.task import agreed_task, build_task

GRADIENTS = (('gradient_equilibrium', True, 'False'), ('conflict_averse', 0.4, '0'), ('own_channels', 0.5, '0'))
"""What changes the gradients of parameters that exits share: the field of the loss, a value, and its value when off."""


def config(name='PN2-dd', family='paranet', **train):
  found = base_config(name, family)
  found.data.update(name='digits', held_out=300)
  found.model.image_side = tiny.SIDE
  if family == 'paranet':
    found.model.update(layers_per_block=1, growth_rate=2, bn_size=2)
  found.train.update({'batch_size': 100, 'epochs': 2.0} | train)
  return found


def test_balanced_class_weights():
  given = config()
  given.loss.class_weights = 'balanced'
  task = build_task(given)
  expected = 1137 / (10 * np.bincount(task.dataset.train.labels))
  assert task.class_weights == task.objective.class_weights == pytest.approx(expected)
  assert task.facts_line(jax.devices()[:1], 1).splitlines()[1] == (
    f'class weights: from {expected.min():g} ({expected.argmin()}) to {expected.max():g} ({expected.argmax()})'
  )
  given.loss.class_weights = '1,2'
  with pytest.raises(UserError, match='loss.class_weights must have 10 numbers, one for each class'):
    build_task(given)


def test_lengths_and_learning_rate():
  """1,137 images make 11 batches of 100; an update is two steps, so the rate drops after 10 and 20 of the 30 epochs."""
  task = build_task(config('PN2-2d', epochs=30.0, accumulate_steps=2, drop_epochs=(10, 20)))
  assert (task.steps_per_epoch, task.total_steps) == (11, 330)
  assert task.image_shape == (tiny.SIDE, tiny.SIDE, 3)
  assert (task.model.num_exits, task.model.num_classes, task.targets) == (2, 10, (2, 0))
  rates = [task.learning_rate(step) for step in (0, 109, 110, 219, 220, 329)]
  np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)


def paths(tree):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
  'name, optimizer, unreached',
  [
    ('PN2-xd', 'sgd', ('exit_1',)),
    ('PN2-dx', 'adamw', ('pipeline_2_', 'exit_2')),
    ('PN2cut-xd', 'sgd', ('pipeline_1_', 'exit_1')),
  ],
)
def test_training_changes_exactly_the_parameters_that_a_loss_reaches(name, optimizer, unreached, standard_promotion):
  task = build_task(config(name, optimizer=optimizer, batch_size=8, weight_decay=0.1))
  order = np.arange(16, dtype=np.int32).reshape(2, 8)
  step = jax.jit(task.train_step())
  before = after = tiny.state(task.model, task.optimizer)
  for _ in range(3):
    train = task.dataset.train
    after, _ = step(after, zero_totals(task.targets), train.images, train.labels, order)
  for part in ('params', 'batch_stats'):
    old, new = paths(getattr(before, part)), paths(getattr(after, part))
    assert old.keys() == new.keys()
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert changed == {path for path in old if not path.startswith(tuple(f"['{prefix}" for prefix in unreached))}


def test_a_backbone_phase_must_end_before_the_run():
  arguments = '--config.train.regime=disjoint', '--config.train.backbone_epochs=2.0'
  assert refusal(*TINY, *arguments) == (
    'train.backbone_epochs must be less than train.epochs 2.0, found 2.0; set --config.train.backbone_epochs'
  )


@pytest.mark.parametrize(
  ('name', 'train', 'message'),
  [
    (
      'PN2-dd',
      {'accumulate_steps': 12, 'epochs': 1.0, 'max_steps': 5},
      'train.accumulate_steps must be at most the 11 steps of the run, found 12, so that no weight would change; set '
      '--config.train.accumulate_steps or --config.train.epochs',
    ),
    (
      'PN2-dd',
      {'regime': 'mixed', 'backbone_epochs': 1.98},  # 21.78 steps of 22.
      'train.backbone_epochs 1.98 leaves none of the 22 steps of the run to what begins then; set '
      '--config.train.backbone_epochs or --config.train.epochs',
    ),
    (
      'PN2-2d',
      {'match': 1.98},
      'loss.match_from_epoch 1.98 leaves none of the 22 steps of the run to what begins then; set '
      '--config.loss.match_from_epoch or --config.train.epochs',
    ),
  ],
)
def test_a_run_reaches_an_update_and_its_second_phase(monkeypatch, name, train, message):
  """An epoch has 11 steps; `train.max_steps` may stop a run before."""

  given = config(name, **{field: value for field, value in train.items() if field != 'match'})
  given.loss.match_from_epoch = train.get('match', 0.0)
  task = build_task(given)
  monkeypatch.setattr(task_lib, 'build_task', lambda *_, **__: task)
  with pytest.raises(UserError) as error:
    agreed_task(given, Coordinator())
  assert str(error.value) == message
  assert agreed_task(given, Coordinator(), Learned(Path('run'))) is task  # It has begun.
  given.train.epochs = 2.1  # 23 steps.
  assert agreed_task(given, Coordinator()) is task


def test_exits_without_their_own_parameters_cannot_train_alone():
  fractal = config('fractal', 'fractalnet', regime='disjoint')
  fractal.model.update(columns=2, widths=(2, 2))
  with pytest.raises(UserError) as error:
    build_task(fractal)
  assert str(error.value) == (
    "train.regime 'disjoint' would train nothing of exit 1 of fractal: exit 3 uses the same parameters; "
    'set --config.train.regime'
  )


def test_exits_that_cannot_be_added_to_a_trained_backbone():
  """Nothing is read to tell."""
  dense = config('dense', 'densenet', regime='exits')
  dense.model.update(depth=10, growth_rate=2, exits='blocks')
  dense.init_from = 'run'
  with pytest.raises(UserError) as error:
    validate(dense)
  assert str(error.value) == (
    "train.regime 'exits' needs a network whose exits read what the backbone computes in inference (model.family "
    "'adopted' or 'resnet'), found 'densenet'; set --config.train.regime, or another --config"
  )


def test_images_that_are_mirrored_in_turn_must_be_in_memory():
  streamed = config('PN1-d', alternate_flip=True)
  streamed.data.update(streaming=True, flip=True)
  with pytest.raises(UserError) as error:
    build_task(streamed)
  assert str(error.value) == (
    'train.alternate_flip needs training images in memory, found streamed ones; set --config.data.streaming=False, or '
    '--config.train.alternate_flip=False'
  )


def test_labels_beside_matched_logits_need_distillation():
  given = config('PN2-2d')
  given.loss.hard_label_weight = 0.5
  with pytest.raises(UserError) as error:
    build_task(given)
  assert str(error.value) == (
    'loss.hard_label_weight 0.5 is the share of labels beside distillation, and PN2-2d matches logits with '
    "loss.matching 'squared_error'; set --config.loss.matching=kl, or --config.loss.hard_label_weight=0"
  )
  build_task(given, learned=Learned(Path('run')))  # It has begun.
  given.loss.matching = 'kl'
  assert build_task(given).objective.hard_label_weight == 0.5


def exits_of_resnet(**train):
  given = config('net', 'resnet', regime='exits', **train)
  given.init_from, given.model.exits, given.model.depth = 'weights.th', 'stages', 8
  return given


@pytest.mark.parametrize(
  ('given', 'fields', 'message'),
  [
    (
      config(),
      {'loss.hard_label_weight': 0.5},
      'loss.hard_label_weight 0.5 is the share of labels beside distillation, and no exit of PN2-dd learns from exits; '
      'set --config.loss.distill, or --config.loss.hard_label_weight=0',
    ),
    (
      exits_of_resnet(exit_targets='labels'),
      {'loss.hard_label_weight': 0.5},
      'loss.hard_label_weight 0.5 is the share of labels beside distillation, and no exit of net learns from exits; '
      'set --config.loss.distill, or --config.loss.hard_label_weight=0',
    ),
    (
      exits_of_resnet(),
      {'loss.class_weights': 'balanced'},
      'loss.class_weights is about losses with labels, and no exit of net learns from labels; set '
      '--config.loss.class_weights=none, or --config.train.exit_targets',
    ),
    (
      exits_of_resnet(),
      {'loss.label_smoothing': 0.1},
      'loss.label_smoothing is about losses with labels, and no exit of net learns from labels; set '
      '--config.loss.label_smoothing=0, or --config.train.exit_targets',
    ),
    (
      config(average=0.9),
      {'loss.teacher': 'run', 'loss.teacher_run': 'run', 'loss.distill': 'all', 'loss.label_smoothing': 0.1},
      'loss.label_smoothing is about losses with labels, and no exit of PN2-dd learns from labels; set '
      '--config.loss.label_smoothing=0, or --config.loss.hard_label_weight',
    ),
    (
      config(),
      {'data.flip': False, 'train.alternate_flip': True},
      'train.alternate_flip needs mirrored images, found data.flip False; set --config.data.flip=True, or '
      '--config.train.alternate_flip=False',
    ),
  ],
)
def test_what_would_change_nothing_is_refused(given, fields, message):
  given = given.copy_and_resolve_references()
  given.update_from_flattened_dict(fields)
  with pytest.raises(UserError) as error:
    build_task(given)
  assert str(error.value) == message
  build_task(given, learned=Learned(Path('run')))  # It has begun.


@pytest.mark.parametrize(
  ('given', 'fields'),
  [
    (config('PN2-2d'), {'loss.label_smoothing': 0.1}),
    (config(), {'loss.hard_label_weight': 0.5, 'loss.distill': 'last', 'loss.class_weights': 'balanced'}),
    (exits_of_resnet(exit_targets='both'), {'loss.hard_label_weight': 0.2, 'loss.label_smoothing': 0.1}),
    (exits_of_resnet(), {'loss.matching': 'kl', 'loss.hard_label_weight': 0.5, 'loss.class_weights': 'balanced'}),
  ],
)
def test_what_changes_something_is_not_refused(given, fields):
  given = given.copy_and_resolve_references()
  given.update_from_flattened_dict(fields)
  assert build_task(given)


@pytest.mark.parametrize(
  ('field', 'value', 'off', 'name', 'regime'),
  [
    *((*field, name, 'joint') for field in GRADIENTS for name in ('PN1-d', 'PN2-xd', 'PN2cut-dd')),
    (*GRADIENTS[0], 'PN2-dd', 'disjoint'),
  ],
)
def test_gradients_are_balanced_where_exits_share_parameters(field, value, off, name, regime):
  given = config(name, regime=regime)
  given.loss[field] = value
  with pytest.raises(UserError) as error:
    build_task(given)
  assert str(error.value) == (
    f'loss.{field} is about parameters that exits train together, and {name} has none with train.regime '
    f"'{regime}'; set --config.loss.{field}={off}"
  )
  build_task(given, learned=Learned(Path('run')))  # It has begun.
  given.name, given.train.regime = 'PN2-dd', 'joint'
  assert build_task(given)


def test_mirror_images_are_matched_where_images_are_mirrored():
  given = config()
  given.loss.match_mirrored = given.data.flip = True
  for regime, flip in (('joint', True), ('exits', False)):
    if regime == 'exits':
      given = config('net', 'resnet', regime=regime)
      given.init_from, given.model.exits, given.loss.match_mirrored = 'weights.th', 'stages', True
    with pytest.raises(UserError) as error:
      build_task(given)
    assert str(error.value) == (
      "loss.match_mirrored needs train.regime 'exits', a last exit that came trained and mirrored images, found "
      f"'{regime}' and data.flip {flip}; set --config.loss.match_mirrored=False, or --config.data.flip=True"
    )


def test_mirror_images_are_matched_by_exits_that_match_something():
  given = config('net', 'resnet', regime='exits', exit_targets='labels')
  given.init_from, given.model.exits = 'weights.th', 'stages'
  given.data.flip = given.loss.match_mirrored = True
  with pytest.raises(UserError) as error:
    build_task(given)
  assert str(error.value) == (
    'loss.match_mirrored is about exits that match the last one, and those of net learn from labels alone; set '
    '--config.loss.match_mirrored=False, or --config.train.exit_targets'
  )
  build_task(given, learned=Learned(Path('run')))  # It has begun.
  given.loss.distill = 'last'
  assert build_task(given).objective.teachers == {1: (3,), 2: (3,)}
  given.loss.distill, given.train.exit_targets = 'none', 'both'
  assert build_task(given).objective.teachers == {1: (3,), 2: (3,)}


@pytest.mark.parametrize(
  ('regime', 'head', 'last', 'found'),
  [('joint', 'blocks', 'own', ''), ('exits', 'conv', 'own', ''), ('exits', 'blocks', 'new', ", model.last 'new'")],
)
def test_features_are_matched_by_exits_of_copied_blocks(regime, head, last, found):
  given = config('net', 'adopted', regime=regime)
  given.model.update(arch='cifar_resnet20', exits='layer2', head=head, last=last)
  given.init_from, given.loss.match_features = 'weights.th', 1.0
  with pytest.raises(UserError) as error:
    build_task(given)
  assert str(error.value) == (
    "loss.match_features needs train.regime 'exits', a last exit that came trained and exits of copied blocks, found "
    f"'{regime}'{found} and model.head '{head}'; set --config.loss.match_features=0"
  )


@pytest.mark.parametrize(
  ('fields', 'side', 'found'),
  [
    ({'train.regime': 'joint'}, 32, "train.regime 'joint'"),
    ({'data.crop_padding': 1}, 32, 'images that are cropped, covered, blended or distorted'),
    ({'train.cutout': 2}, 32, 'images that are cropped, covered, blended or distorted'),
    ({'train.auto_augment': 'trivial'}, 32, 'images that are cropped, covered, blended or distorted'),
    ({}, 28, '14'),
    ({}, 32, None),
    ({'train.feature_shift': 0.125}, 16, None),
    ({'train.feature_shift': 0.125}, 14, '7'),
    # It reads means over all places; the last exit, which does not learn, reads 8 x 8 places.
    ({'train.feature_shift': 0.125, 'model.head': 'linear'}, 32, '1'),
  ],
)
def test_features_are_shifted_by_whole_places(fields, side, found):
  given = config('net', 'adopted', regime='exits')
  given.model.update(arch='cifar_resnet20', exits='layer2', head='conv', image_side=side)
  given.data.crop_padding, given.init_from, given.train.feature_shift = 0, 'weights.th', 1 / 16
  given.update_from_flattened_dict(fields)
  if found is None:
    assert build_task(given).keeps_features
    return
  with pytest.raises(UserError) as error:
    build_task(given)
  shift = given.train.feature_shift
  assert str(error.value) == (
    f"train.feature_shift {shift:g} needs train.regime 'exits', images that are at most mirrored, and features of "
    f'{round(1 / shift)} places or more along a side, found {found}; set --config.train.feature_shift=0'
  )
  build_task(given, learned=Learned(Path('run')))  # It has begun.


def test_tokens_are_not_shifted(monkeypatch):
  small = small_architectures.register(monkeypatch, 'vit')
  given = config('net', 'adopted', regime='exits')
  given.model.update(arch=small.name, exits=small.places[1], head='class_token', image_side=32)
  given.data.crop_padding, given.init_from, given.train.feature_shift = 0, 'weights.th', 0.5
  with pytest.raises(UserError, match='and features of 2 places or more along a side, found tokens; set --config.tr'):
    build_task(given)


def test_phases_follow_the_epochs():
  ends = {
    (regime, epochs): [phase.end for phase in build_task(config(regime=regime, backbone_epochs=epochs)).phases]
    for regime, epochs in (('joint', 0.5), ('mixed', 0.5), ('mixed', None))
  }
  # 11 steps an epoch.
  assert ends == {('joint', 0.5): [22], ('mixed', 0.5): [6, 22], ('mixed', None): [11, 22]}
  task = build_task(config(regime='mixed', backbone_epochs=0.5))
  assert [task.phase(step).end for step in (0, 5, 6, 22)] == [6, 6, 22, 22]


@pytest.mark.parametrize(
  ('distill', 'teacher', 'before'),
  [('next', 'network', {}), ('later', 'average', {1: (3,)}), ('later', 'run', {1: (2, 3)})],
)
def test_an_exit_that_has_not_begun_to_learn_teaches_none(monkeypatch, distill, teacher, before):
  """Exit 2 learns nothing until it matches exit 3; another run's has learned."""
  monkeypatch.setattr(task_lib, 'make_train_step', lambda model, optimizer, objective, *_, **__: objective.teachers)
  given = config('PN3-d3d', average=0.9)
  given.loss.update(match_from_epoch=1.0, match_before='nothing', distill=distill, teacher=teacher)
  given.loss.teacher_run = 'run' if teacher == 'run' else ''
  task = build_task(given)
  assert [dict(task.train_step(phase=phase)) for phase in task.phases] == [before, task.objective.teachers]


def test_the_second_phase_of_mixed_is_joint_training(monkeypatch):
  monkeypatch.setattr(task_lib, 'make_train_step', lambda *arguments, **options: (arguments, options))
  joint = build_task(config())
  of_regime = {regime: config(regime=regime) for regime in ('mixed', 'disjoint')}
  mixed, disjoint = (dataclasses.replace(joint, config=own) for own in of_regime.values())
  assert joint.train_step() == mixed.train_step() != disjoint.train_step()
  (_, _, backbone, *_), alike = mixed.train_step(phase=mixed.phases[0])
  assert backbone.targets == (None, 0) and alike == {'frozen': (), 'users': None, 'conflict': 0.0, 'average': 0.0}
  (_, _, others, *_), options = disjoint.train_step(phase=disjoint.phases[1])
  assert others.targets == (0, None) and ('params', 'pipeline_1_stem', 'kernel') in options['frozen']
  assert {path[1] for path in all_paths(joint) - options['frozen']} == {'exit_1'}


def all_paths(task):
  return variable_paths(task.model, task.image_shape, 1, 2)


# Phases of 3 and 7 steps; checkpoints at steps 3, 6, 9 and 10 and where the run is stopped.
DISJOINT = (
  *(*TINY, '--config.name=PN2-2d', '--config.train.regime=disjoint', '--config.train.backbone_epochs=0.6'),
  *('--config.checkpoint.every_steps=3', '--config.checkpoint.keep=9'),
)


@pytest.fixture(scope='module')
def disjoint(tmp_path_factory):
  """Workdir of a run with two phases."""
  workdir = tmp_path_factory.mktemp('disjoint')
  with pytest.MonkeyPatch.context() as patch:
    PROGRAMS.install(patch)
    assert run_main(*DISJOINT, f'--workdir={workdir}').code == 0
    yield workdir


def variables_at(step, workdir):
  """Values in a checkpoint, by path from the collection on."""
  with Checkpoints(workdir) as checkpoints:
    found = checkpoints.read_variables(step)
  return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def moved(before, after):
  assert before.keys() == after.keys()
  return {path for path in before if not np.array_equal(before[path], after[path])}


def test_what_moves_in_each_phase(disjoint):
  task = build_task(restore_config(disjoint))
  state = task.init_state()
  start = jax.tree_util.tree_leaves_with_path({'params': state.params, 'batch_stats': state.batch_stats})
  start = {tuple(key.key for key in path): np.asarray(leaf) for path, leaf in start}
  backbone, end = variables_at(3, disjoint), variables_at(10, disjoint)
  of_last = variable_paths(task.model, task.image_shape, 2)
  assert moved(start, backbone) == of_last
  assert moved(backbone, end) == start.keys() - of_last
  assert {path[1] for path in start.keys() - of_last} == {'exit_1'}


def test_metrics_cover_the_exits_that_a_phase_trains(disjoint):
  lines = [line for line in read_metrics(disjoint) if line['split'] == 'train']
  exits = [(line['step'], sorted(int(key[5]) for key in line if key.endswith('/loss'))) for line in lines]
  assert exits == [(2, [2]), (3, [2]), (4, [1]), (6, [1]), (8, [1]), (10, [1])]
  # Each line is the mean over its own steps: the totals start again.
  assert all(
    line['loss'] == pytest.approx(line[f'exit_{number}/loss'])
    for line, (_, (number,)) in zip(lines, exits, strict=True)
  )


def test_a_run_stopped_in_each_phase_ends_like_an_uninterrupted_one(disjoint, tmp_path):
  for step in (2, 3, 4):  # Within the first phase, at its end, within the second.
    with pytest.MonkeyPatch.context() as patch:
      before_each_step(patch, send(signal.SIGTERM, step))
      result = run_main(*DISJOINT, f'--workdir={tmp_path}')
    assert result.code == 0 and f'stopped by SIGTERM after step {step}, saved' in result.out
  assert run_main(*DISJOINT, f'--workdir={tmp_path}').code == 0
  chex.assert_trees_all_equal(saved_state(tmp_path), saved_state(disjoint), strict=True)


@pytest.mark.parametrize('first', [True, False])
def test_only_process_0_logs_how_the_data_changed(monkeypatch, caplog, first):
  processes = SimpleNamespace(
    count=1, is_first=first, object_from_first=lambda value: value, first_then_others=lambda act: act()
  )
  monkeypatch.setattr(task_lib, 'build_task', lambda config, learned: learned)
  task_lib.agreed_task(None, processes, Learned(Path('run'))).log('%d images are gone', 3)
  assert caplog.messages == ['3 images are gone'] * first
