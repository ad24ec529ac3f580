"""Tests of benchmarks/early_exit.py: its plans and costs, and what it prints."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from running import TINY, run_main

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import paranet_jax
from benchmarks import early_exit
from paranet_jax.base_config import base_config
from paranet_jax.calibrate import latency
from paranet_jax.early.exit_plan import CheckpointId, full_network_plan
from paranet_jax.early.path_costs import PathCosts, mac_costs
from paranet_jax.task import build_task

FLAGS = ['--layers=1', '--growth_rate=2', '--side=8', '--batches=1,3', '--rounds=1', '--seconds=0', '--json']
# Exits 2 and 3 cost 20 and 50 more after any exit before them, 25 and 60 where they are first.
COSTS = PathCosts(3, lambda before, index: (10, 20, 50)[index] if before or not index else (10, 25, 60)[index])
PLAN = full_network_plan(CheckpointId('', '', 0, ''), (1, 2, 4), [10, 25, 60])


def test_a_plan_from_thresholds():
  plan = early_exit.with_thresholds(PLAN, np.array([np.inf, 1.5, -np.inf]), COSTS)
  assert (plan.confidence_thresholds, plan.visited, plan.macs) == ((None, 1.5, 0.0), (2, 4), (None, 25, 75))


def test_mean_cost_of_the_exits_taken():
  plan = early_exit.with_thresholds(PLAN, np.array([0.5, 1.5, -np.inf]), COSTS)
  # 10, 30 and 80 along the path.
  assert early_exit.mean_cost(COSTS, plan, np.array([1, 1, 2, 4])) == (10 + 10 + 30 + 80) / 4


def test_the_break_even_share():
  # All stages take 80, the last exit alone 60: a share s that exits after 10 saves s (80 - 10) = 80 - 60.
  assert early_exit.break_even_share(COSTS) == pytest.approx(20 / 70)
  free = PathCosts(2, lambda before, index: 10 if before or not index else 20)
  assert early_exit.break_even_share(free) == 0


def measured(flags, capsys, monkeypatch):
  # Every stage takes 1 ms for any batch.
  monkeypatch.setattr(latency, 'median_seconds', lambda function, runs: 1e-3)
  assert early_exit.main([*FLAGS, *flags]) == 0
  out = capsys.readouterr().out
  assert out.count('\n') == 1
  result = json.loads(out)
  assert {'ours', 'theirs', 'ratio', 'rows', 'break_even', 'machine', 'versions', 'date'} <= set(result)
  assert [result[name] for name in ('ours', 'theirs', 'ratio')] == [
    result['rows'][0][name] for name in ('ours', 'theirs', 'ratio')
  ]
  assert {row['peer'] for row in result['rows']} == {'always last exit'}
  return result


BUDGETS = [f'budget {share}%' for share in (10, 25, 50, 75, 90, 100)]


def test_random_weights(capsys, monkeypatch):
  result = measured([], capsys, monkeypatch)
  assert [(row['what'], row['batch']) for row in result['rows']] == [(b, size) for size in (1, 3) for b in BUDGETS]
  macs = [row['macs'] for row in result['rows'][6:]]
  # Chosen on the images that are timed: no budget is exceeded; the smallest is that of the first exit.
  assert macs == sorted(macs, reverse=True) and macs[2] >= 2 and macs[-1] == 1
  assert {row['accuracy'] for row in result['rows']} == {None}
  assert result['rows'][-1]['latency'] == 1
  # Three stages of 1 ms against one: all must exit at the first, (3 - 1) / (3 - 1).
  assert result['break_even'] == {'1': 1.0, '3': 1.0}


def test_a_run(tmp_path, capsys, monkeypatch):
  workdir = tmp_path / 'run'
  assert run_main(*TINY, '--config.data.held_out=200', f'--workdir={workdir}').code == 0
  result = measured([f'--workdir={workdir}', '--batches=3'], capsys, monkeypatch)
  assert [row['what'] for row in result['rows']] == ['equal accuracy', *BUDGETS]
  run = paranet_jax.load(workdir)
  test = build_task(run.config).dataset.test
  images = (test.images[:192] / np.float32(255) - np.float32(run.dataset.mean)) / np.float32(run.dataset.std)
  right = np.argmax(run.model.apply(run.variables, images, exits=(3,))[2], -1) == test.labels[:192]
  accuracies = [float(right.mean())] * 7  # Of 64 batches of three images.
  assert [row['last_accuracy'] for row in result['rows']] == pytest.approx(accuracies, rel=1e-4)
  costs = mac_costs(run.model, run.image_shape, (2, 3))
  # From all through both exits to all at the first.
  least, most = costs.alone()[1] / costs.cumulative((0, 1))[1], costs.alone()[1] / costs.alone()[0]
  assert all(least - 1e-4 < row['macs'] < most + 1e-4 and 0 <= row['accuracy'] <= 1 for row in result['rows'])


def test_a_run_with_one_trained_exit(capsys, monkeypatch):
  config = base_config('PN3-xxd')
  config.data.update(name='digits', held_out=100)
  monkeypatch.setattr(early_exit, 'load', lambda workdir: types.SimpleNamespace(config=config))
  assert early_exit.main([*FLAGS, '--workdir=run']) == 2
  message = 'error: expected a run with two trained exits or more, run has one; set --workdir'
  assert capsys.readouterr().err.splitlines()[-1] == message


def test_a_run_without_held_out_images(tmp_path, capsys):
  flags = '--config.data.held_out=0', '--config.train.max_steps=1', f'--workdir={tmp_path / "run"}'
  assert run_main(*TINY, *flags).code == 0
  assert early_exit.main([*FLAGS, f'--workdir={tmp_path / "run"}']) == 2
  assert capsys.readouterr().err.splitlines()[-1] == (
    f'error: expected a run with held-out images, {tmp_path / "run"} has none; train one with --config.data.held_out=N'
  )
