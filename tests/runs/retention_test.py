"""Tests of which checkpoints a run makes and keeps."""

import json
import math
import signal
from types import SimpleNamespace
from unittest import mock

import pytest
from running import TINY, before_each_step, refusal, run_main, send

from paranet_jax.base_config import base_config
from paranet_jax.evaluation import MEASURES
from paranet_jax.host.processes import Coordinator
from paranet_jax.runs.record import RunRecord
from paranet_jax.runs.retention import HIGHER_IS_BETTER, Retention
from paranet_jax.targets import GIVEN, Phase, make_phases, parse_name

pytestmark = pytest.mark.usefixtures('programs')

# 5 steps an epoch, 10 in all; saved after every 4 and at the end, the last 2 kept.
RUN = *TINY, '--config.name=PN1-d'


JOINT = (Phase(20, parse_name('PN2-2d').targets),)


def task_of(config, phases=JOINT):
  """A run of 5 steps an epoch, evaluated after every 10."""
  return SimpleNamespace(config=config, phases=phases, steps_per_epoch=5, evaluation_steps=10)


def retention(workdir, **fields):
  """Of a run whose last trained exit is its second."""
  config = base_config()
  config.checkpoint.update({'every_steps': 4} | fields)
  return Retention(task_of(config), workdir)


@pytest.mark.parametrize('first', [True, False])
def test_only_process_0_reads_the_metrics(tmp_path, first):
  (tmp_path / 'metrics.jsonl').write_text(json.dumps({'step': 4, 'split': 'held_out', 'exit_2/nll': 0.5}) + '\n')
  config = base_config()
  config.checkpoint.keep_best = 'nll'
  record = RunRecord(task_of(config), tmp_path, mock.Mock() if first else None, Coordinator())
  assert record._retention.best([4, 8]) == (4 if first else None)


@pytest.mark.parametrize(
  ('fields', 'saved', 'kept'),
  [
    ({}, [4, 8, 12, 16, 20], set()),
    ({'keep_every_epochs': 2.0}, [4, 8, 10, 12, 16, 20], {10, 20}),
    ({'keep_every_epochs': 1.5}, [4, 8, 12, 16, 20], {8, 16}),  # 7.5 steps are 8.
    ({'keep_every_epochs': 0.05}, [*range(1, 21)], {*range(1, 21)}),  # Less than a step is one.
    ({'keep_best': 'nll'}, [4, 8, 10, 12, 16, 20], set()),
    ({'keep_best': 'nll', 'keep_every_epochs': 3.0}, [4, 8, 10, 12, 15, 16, 20], {15}),
  ],
)
def test_what_is_saved_and_what_is_kept_for_good(tmp_path, fields, saved, kept):
  found = retention(tmp_path, **fields)
  assert [step for step in range(1, 21) if found.saves_after(step)] == saved
  assert found.kept(saved) == kept


@pytest.mark.parametrize(
  ('measure', 'values', 'best'),
  [
    ('accuracy', {2: 0.5, 4: 0.7, 6: 0.6}, 4),
    ('top5', {2: 0.9, 4: 0.7}, 2),
    ('nll', {2: 1.5, 4: 1.2, 6: 1.3}, 4),
    ('loss', {2: 1.5, 4: 1.2}, 4),
    ('nll', {2: 1.5, 4: 1.5, 6: 1.6}, 4),  # Of equals the later.
    ('nll', {2: 1.5, 4: math.nan, 6: None}, 2),
    ('nll', {3: 1.0}, None),  # Evaluated and not saved.
    ('nll', {2: 1.5, 3: 1.0}, 2),
    ('accuracy', {}, None),
  ],
)
def test_the_best(tmp_path, measure, values, best):
  found = retention(tmp_path, keep_best=measure)
  for step, value in values.items():
    found.note(step, {f'exit_2/{measure}': value, f'exit_1/{measure}': 0.0})
  assert found.best([2, 4, 6]) == best
  assert found.kept([2, 4, 6]) == (set() if best is None else {best})


@pytest.mark.parametrize(
  ('phases', 'exit_number', 'best'),
  [
    (make_phases('joint', (0, 0, 0), 0, 12), 3, 2),
    (make_phases('joint', (3, 0, 0), 0, 12, match_step=4, match_before='labels'), 3, 2),
    (make_phases('joint', (3, 0, 0), 0, 12, match_step=4, match_before='nothing'), 3, 6),
    (make_phases('mixed', (0, 0, 0), 4, 12), 3, 6),
    # The last exit changes no more, and that of a trained network never did.
    (make_phases('disjoint', (0, 0, 0), 4, 12), 2, 6),
    (make_phases('exits', (3, 3, GIVEN), 0, 12), 2, 2),
    (make_phases('exits', (0, 0, 0), 0, 12), 3, 2),
  ],
)
def test_the_best_is_that_of_an_exit_that_trains_to_the_end(tmp_path, phases, exit_number, best):
  config = base_config()
  config.checkpoint.keep_best = 'accuracy'
  found = Retention(task_of(config, phases), tmp_path)
  for step, value in {2: 0.9, 4: 0.8, 6: 0.7, 8: 0.6}.items():
    measured = {f'exit_{number}/accuracy': 0.5 for number in (1, 2, 3)}
    found.note(step, measured | {f'exit_{exit_number}/accuracy': value})
  assert found.best([2, 4, 6, 8]) == best


def test_no_evaluation_before_the_exits_train_is_saved(tmp_path):
  config = base_config()
  config.checkpoint.keep_best = 'accuracy'
  found = Retention(task_of(config, make_phases('mixed', (0, 0, 0), 10, 20)), tmp_path)
  assert [step for step in range(1, 21) if found.saves_after(step)] == [20]


def test_every_measure_has_its_better_side():
  assert set(HIGHER_IS_BETTER) == set(MEASURES)


def steps(workdir):
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def test_a_run_keeps_its_best_although_it_is_stopped(tmp_path, monkeypatch):
  note = Retention.note
  monkeypatch.setattr(Retention, 'note', lambda self, step, _: note(self, step, {'exit_1/nll': abs(step - 3)}))
  arguments = *RUN, '--config.eval.every_epochs=0.2', '--config.checkpoint.keep_best=nll', f'--workdir={tmp_path}'
  with pytest.MonkeyPatch.context() as patch:
    before_each_step(patch, send(signal.SIGTERM, 7))
    assert run_main(*arguments).code == 0
  assert steps(tmp_path) == [3, 6, 7]
  out = run_main(*arguments).out.splitlines()
  assert steps(tmp_path) == [3, 9, 10]
  assert [line.split('; ')[1:] for line in out if line.startswith('finished in ')] == [['best by nll: step 3']]


def test_a_run_keeps_one_every_so_many_epochs(tmp_path):
  arguments = *RUN, '--config.checkpoint.keep_every_epochs=0.6', '--config.checkpoint.keep=1'
  assert run_main(*arguments, f'--workdir={tmp_path}').code == 0
  assert steps(tmp_path) == [3, 6, 9, 10]


def test_the_best_needs_images_held_out():
  assert refusal(*RUN, '--config.checkpoint.keep_best=nll', '--config.data.held_out=0') == (
    'checkpoint.keep_best needs a held-out split, found data.held_out 0; '
    'set --config.data.held_out, or --config.checkpoint.keep_best=none'
  )
