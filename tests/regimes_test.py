"""Tests of which exits train when, and of what stays as it is meanwhile."""

import dataclasses
import signal

import chex
import jax
import numpy as np
import pytest
from running import PROGRAMS, TINY, before_each_step, refusal, run_main, saved_state, send

from paranet_jax import task as task_lib
from paranet_jax.base_config import base_config
from paranet_jax.costs import variable_paths
from paranet_jax.host.errors import UserError
from paranet_jax.report.metrics import read_metrics
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.workdir import restore_config
from paranet_jax.targets import Phase, check_regime, make_phases
from paranet_jax.task import build_task


@pytest.mark.parametrize(
  ('regime', 'targets', 'phases'),
  [
    ('joint', (3, None, 0), (((3, None, 0), 10, None),)),
    ('mixed', (0, None, 0, None), (((None, None, 0, None), 4, None), ((0, None, 0, None), 10, None))),
    ('disjoint', (0, 3, 0), (((None, None, 0), 4, None), ((0, 3, None), 10, 3))),
  ],
)
def test_make_phases(regime, targets, phases):
  expected = tuple(Phase(end, own, frozen) for own, end, frozen in phases)
  assert make_phases(regime, targets, backbone_steps=4, total_steps=10) == expected


@pytest.mark.parametrize(
  ('targets', 'message'),
  [
    (
      (None, 0, None),
      "train.regime 'mixed' trains the last exit first and then others, and NET trains exit 2 alone; "
      'set --config.train.regime',
    ),
    (
      (0, 1, None),
      "train.regime 'mixed' trains the last exit alone first, from labels, and exit 2 of NET learns from exit 1; "
      'set --config.train.regime',
    ),
  ],
)
def test_exits_that_a_regime_of_two_phases_does_not_fit(targets, message):
  with pytest.raises(UserError) as error:
    check_regime('mixed', targets, 'NET')
  assert str(error.value) == message
  check_regime('joint', targets, 'NET')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      ('train.regime=disjoint', 'train.backbone_epochs=2.0'),
      'train.backbone_epochs must be less than train.epochs 2.0, found 2.0; set --config.train.backbone_epochs',
    ),
    (
      ('train.regime=mixed', 'name=PN1-d'),
      "train.regime 'mixed' trains the last exit first and then others, and PN1-d trains exit 1 alone; "
      'set --config.train.regime',
    ),
  ],
)
def test_one_line(arguments, message):
  assert refusal(*TINY, *(f'--config.{argument}' for argument in arguments)) == message


def config(name='PN2-dd', family='paranet', **train):
  found = base_config(name, family)
  found.data.update(name='digits', held_out=300)
  found.model.image_side = 8
  if family == 'paranet':
    found.model.update(layers_per_block=1, growth_rate=2, bn_size=2)
  found.train.update(batch_size=100, epochs=2.0)
  found.train.update(train)
  return found


def test_exits_without_parameters_of_their_own_cannot_train_alone():
  fractal = config('fractal', 'fractalnet', regime='disjoint')
  fractal.model.update(columns=2, widths=(2, 2))
  with pytest.raises(UserError) as error:
    build_task(fractal)
  assert str(error.value) == (
    "train.regime 'disjoint' would train nothing of exit 1 of fractal: exit 3 uses the same parameters; "
    'set --config.train.regime'
  )


def test_phases_follow_the_epochs():
  ends = {
    (regime, epochs): [phase.end for phase in build_task(config(regime=regime, backbone_epochs=epochs)).phases]
    for regime, epochs in (('joint', 0.5), ('mixed', 0.5), ('mixed', None))
  }
  # 11 steps an epoch.
  assert ends == {('joint', 0.5): [22], ('mixed', 0.5): [6, 22], ('mixed', None): [11, 22]}
  task = build_task(config(regime='mixed', backbone_epochs=0.5))
  assert [task.phase(step).end for step in (0, 5, 6, 22)] == [6, 6, 22, 22]


def test_the_second_phase_of_mixed_is_joint_training(monkeypatch):
  monkeypatch.setattr(task_lib, 'make_train_step', lambda *arguments, **options: (arguments, options))
  joint = build_task(config())
  of_regime = {regime: config(regime=regime) for regime in ('mixed', 'disjoint')}
  mixed, disjoint = (dataclasses.replace(joint, config=own) for own in of_regime.values())
  assert joint.train_step() == mixed.train_step() != disjoint.train_step()
  (_, _, body, *_), alike = mixed.train_step(phase=mixed.phases[0])
  assert body.targets == (None, 0) and alike == {'frozen': (), 'users': None}
  (_, _, others, *_), options = disjoint.train_step(phase=disjoint.phases[1])
  assert others.targets == (0, None) and ('params', 'pipeline_1_stem', 'kernel') in options['frozen']
  assert {path[1] for path in all_paths(joint) - options['frozen']} == {'exit_1'}


def all_paths(task):
  return variable_paths(task.model, task.image_shape, 1, 2)


# Phases of 3 and 7 steps; checkpoints of steps 3, 6, 9 and 10, and of where it is stopped.
DISJOINT = (
  *(*TINY, '--config.name=PN2-2d', '--config.train.regime=disjoint', '--config.train.backbone_epochs=0.6'),
  *('--config.checkpoint.every_steps=3', '--config.checkpoint.keep=9'),
  *('--config.model.growth_rate=2', '--config.model.image_side=8'),
)


@pytest.fixture(scope='module')
def disjoint(tmp_path_factory):
  """The folder of a run in two phases."""
  workdir = tmp_path_factory.mktemp('disjoint')
  with pytest.MonkeyPatch.context() as patch:
    PROGRAMS.install(patch)
    assert run_main(*DISJOINT, f'--workdir={workdir}').code == 0
    yield workdir


def variables_at(step, workdir):
  """{path from the collection on: values} of a checkpoint."""
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
  body, end = variables_at(3, disjoint), variables_at(10, disjoint)
  of_last = variable_paths(task.model, task.image_shape, 2)
  assert moved(start, body) == of_last
  assert moved(body, end) == start.keys() - of_last
  assert {path[1] for path in start.keys() - of_last} == {'exit_1'}


def test_lines_say_what_trained(disjoint):
  lines = [line for line in read_metrics(disjoint) if line['split'] == 'train']
  exits = [(line['step'], sorted(int(key[5]) for key in line if key.endswith('/loss'))) for line in lines]
  assert exits == [(2, [2]), (3, [2]), (4, [1]), (6, [1]), (8, [1]), (10, [1])]
  # Each line is the mean over its own steps: the totals begin anew.
  assert all(
    line['loss'] == pytest.approx(line[f'exit_{number}/loss'])
    for line, (_, (number,)) in zip(lines, exits, strict=True)
  )


# Within the first phase, at its end, within the second.
@pytest.mark.parametrize('step', [2, 3, 4])
def test_a_run_that_was_stopped_ends_as_the_other(disjoint, tmp_path, step):
  with pytest.MonkeyPatch.context() as patch:
    before_each_step(patch, send(signal.SIGTERM, step))
    result = run_main(*DISJOINT, f'--workdir={tmp_path}')
  assert result.code == 0 and f'stopped by SIGTERM after step {step}, saved' in result.out
  assert run_main(*DISJOINT, f'--workdir={tmp_path}').code == 0
  chex.assert_trees_all_equal(saved_state(tmp_path), saved_state(disjoint), strict=True)
