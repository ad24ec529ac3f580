"""Tests of the numbers, the tables and the figure, from summaries written by hand."""

import json

import pytest
from reference import PN3

from paranet_jax.config import drop_epochs
from paranet_jax.experiments import figure
from paranet_jax.experiments.figure import anytime_figure
from paranet_jax.experiments.markdown import table_markdown
from paranet_jax.experiments.planned_runs import plan_runs
from paranet_jax.experiments.protocols import Protocol, default_workdir, parse_protocol, reductions, run_config
from paranet_jax.experiments.published import CURVES, EXPERIMENTS, FIGURE_MACS, TABLES
from paranet_jax.experiments.results import section, write_results
from paranet_jax.models.msdnet import MSDNet
from paranet_jax.optim import make_schedule

EPYC = {'processor': 'AMD EPYC', 'cores': 1, 'finished': '2026-11-30'}
TENTH = Protocol('tenth', {'model.layers_per_block': '4'})


@pytest.fixture
def finished(tmp_path):
  """Runs of every network with two seeds: with seed s, exit p of network i is right on 40 + 10 p + i + 2 s percent."""
  runs = plan_runs(EXPERIMENTS, TENTH, 2, tmp_path / 'results')
  names = list(dict.fromkeys(run.name for run in runs))

  def summary(run):
    exits = [
      {'accuracy': (40 + 10 * p + names.index(run.name) + 2 * run.seed) / 100, 'macs': 1000 * p, 'params': 100 * p}
      for p in (1, 2, 3)
    ]
    device = {'platform': 'cpu', 'kind': 'cpu', 'count': 1}
    found = {'steps': 10_153, 'exits': exits, 'versions': {}, 'device': device, 'wall_time_s': 61.0}
    # Version 0.1.0 did not write where and when.
    return found | (EPYC if run.seed else {})

  return [(run, summary(run)) for run in runs]


def test_what_changes_no_parameter_is_no_reduction():
  fields = {'eval.every_epochs': '5', 'log.every_steps': '7', 'data.workers': '2', 'train.devices': '1'}
  config = run_config(Protocol('tenth', fields), 'PN3-ddd', 3)
  assert reductions(config) == ['train.epochs: 130.0 -> 13.0']


def test_each_run_is_planned_once_seed_by_seed(finished):
  names = ['PN3cut-ddd', 'PN3-ddd', 'PN3-xdx', 'PN3-x3d']
  assert [str(run) for run, _ in finished] == [f'{name}-s{seed}' for seed in (0, 1) for name in names]


def test_table_1(finished):
  found = section('table1', finished)
  # Exit 1 of PN3cut-ddd: 50 and 52 percent, so 51 with a sample standard deviation of sqrt(2).
  assert found['rows'][0] == {
    'network': 'PN3cut-ddd',
    'exit': 1,
    'paper': 50.39,
    'paper_std': 0.248,
    'ours': pytest.approx(51),
    'std': pytest.approx(2**0.5),
    'difference': pytest.approx(0.61),
    'each_seed': pytest.approx([50, 52]),
    'macs': 1000,
    'params': 100,
  }
  assert [row['ours'] for row in found['rows']] == pytest.approx([51, 61, 71, 52, 62, 72])
  # The cascade adds 1 percent in both seeds.
  assert [effect['exit'] for effect in found['effects']] == [1, 2, 3]
  for effect, paper in zip(found['effects'], (-2.16, 0.046, 1.658), strict=True):
    assert effect['what'] == 'PN3-ddd - PN3cut-ddd' and effect['paper'] == pytest.approx(paper)
    assert effect['each_seed'] == pytest.approx([1, 1])
    assert (effect['ours'], effect['std']) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
  assert found['seeds'] == [0, 1] and found['dataset'] == 'cifar100'
  assert found['reduced'] == ['model.layers_per_block: 16 -> 4', 'train.epochs: 130.0 -> 13.0']
  assert [run['run'] for run in found['runs']] == ['PN3cut-ddd-s0', 'PN3-ddd-s0', 'PN3cut-ddd-s1', 'PN3-ddd-s1']


def test_table_2_as_text(finished, tmp_path):
  text = table_markdown(section('table2', finished), 'tenth')
  command = (
    'python -m paranet_jax.main --config=configs/paranet.py:PN3-{} --config.model.layers_per_block=4 '
    '--config.train.epochs=13 --config.seed={} --workdir={}/results/runs/PN3-{}-s{}'
  )
  less = 'model.layers_per_block: 16 -> 4; train.epochs: 130.0 -> 13.0'
  assert text.replace(' \\\n  ', ' ').splitlines() == [
    '# Table 2: logit matching',
    '',
    "Does the second pipeline learn more from the third one's logits (x3d) than from the labels (xdx)?",
    '',
    f'Protocol tenth, seeds 0, 1 (mean +- standard deviation, n - 1). Reduced (paper -> here): {less}.',
    '',
    '| network | pipeline | paper (%) | ours (%) | difference | seeds | multiply-adds | parameters '
    '| differs from the paper |',
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    f'| PN3-xdx | 2 | 65.674 +- 0.346 | 63.00 +- 1.41 | -2.67 | 0, 1 | 2,000 | 200 | {less} |',
    f'| PN3-x3d | 2 | 67.024 +- 0.311 | 64.00 +- 1.41 | -3.02 | 0, 1 | 2,000 | 200 | {less} |',
    '',
    'Test accuracy of the last checkpoint; multiply-adds per image and parameters include this exit and the ones '
    'before it, tried in turn. Difference: ours - paper.',
    '',
    '| difference | pipeline | paper | ours | each seed |',
    '| --- | --- | --- | --- | --- |',
    '| PN3-x3d - PN3-xdx | 2 | +1.35 | +1.00 +- 0.00 | +1.00, +1.00 |',
    '',
    '| run | steps | finished | device | processor | cores | wall time |',
    '| --- | --- | --- | --- | --- | --- | --- |',
    *(f'| PN3-{n}-s0 | 10,153 | — | 1 x cpu | — | — | 1 min 01 s |' for n in ('xdx', 'x3d')),
    *(f'| PN3-{n}-s1 | 10,153 | 2026-11-30 | 1 x cpu | AMD EPYC | 1 | 1 min 01 s |' for n in ('xdx', 'x3d')),
    '',
    '```bash',
    *(command.format(n, s, tmp_path, n, s) for s in (0, 1) for n in ('xdx', 'x3d')),
    '```',
  ]


def test_table_of_one_seed_and_another_data_set(finished):
  found = section('table2', [pair for pair in finished if pair[0].seed == 0])
  text = table_markdown(found | {'dataset': 'digits', 'reduced': []}, 'smoke')
  assert '| PN3-xdx | 2 | 65.674 +- 0.346 | 62.00 | -3.67 | 0 | 2,000 | 200 | nothing |' in text.splitlines()
  assert "Protocol smoke, seed 0 only. Nothing is reduced: the paper's own training. Not comparable: on digits," in text


@pytest.mark.parametrize('dataset', ['cifar100', 'digits'])
def test_figure_2(finished, dataset):
  found = section('figure2', finished) | {'dataset': dataset}
  figure = anytime_figure(found, 'tenth')
  (axes,) = figure.axes
  lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != '_'}
  ours = [[0.001, 52], [0.002, 62], [0.003, 72]]
  assert lines.pop('PN3-ddd, ours') == [pytest.approx(point) for point in ours]
  paper = lines.pop('PN3-ddd, the paper (costs by our count)', None)
  assert paper == ([[3.413088, 48.23], [23.53872, 65.63], [125.943456, 76.24]] if dataset == 'cifar100' else None)
  assert list(lines) == ([f'{curve.label} (published)' for curve in CURVES] if dataset == 'cifar100' else [])
  assert axes.get_xlabel() == 'cost per image, exits tried in turn (M multiply-adds)'
  assert axes.get_ylabel() == f'test accuracy on {dataset} (%)'
  assert len(axes.containers) == 1  # The standard deviations of two seeds.
  assert not anytime_figure(found | {'seeds': [0]}, 'tenth').axes[0].containers


def test_a_figure_that_cannot_be_drawn_loses_no_results(finished, tmp_path, monkeypatch):
  def fails(*_):
    raise ValueError('no font')

  monkeypatch.setattr(figure, 'anytime_figure', fails)
  text = write_results(tmp_path, {'protocol': 'tenth', 'experiments': {}}, ['figure2'], finished)
  assert text == 'figure2.png: not drawn: no font'
  assert 'figure2' in json.loads((tmp_path / 'results.json').read_text())['experiments']


def test_published_numbers():
  rows = {(row.network, row.exit): (row.accuracy, row.std) for table in TABLES.values() for row in table.rows}
  assert rows == {
    ('PN3cut-ddd', 1): (50.39, 0.248),
    ('PN3cut-ddd', 2): (65.584, 0.132),
    ('PN3cut-ddd', 3): (74.582, 0.234),
    ('PN3-ddd', 1): (48.23, None),
    ('PN3-ddd', 2): (65.63, None),
    ('PN3-ddd', 3): (76.24, None),
    ('PN3-xdx', 2): (65.674, 0.346),
    ('PN3-x3d', 2): (67.024, 0.311),
  }
  assert list(FIGURE_MACS) == [macs for _, macs in PN3]
  assert all(len(curve.macs_millions) == len(curve.accuracy) for curve in CURVES)
  assert len(CURVES[0].accuracy) == MSDNet().num_blocks


@pytest.mark.parametrize(
  ('protocol', 'epochs', 'drops'), [('paper', 130, (50, 100)), ('tenth', 13, (5, 10))]
)  # fmt: skip
def test_epochs_and_drops(protocol, epochs, drops):
  config = run_config(Protocol(protocol, {}), 'PN3-ddd', 0)
  train = config.train
  assert train.epochs == epochs
  rate = make_schedule(
    train.schedule, train.learning_rate, epochs=train.epochs, updates_per_epoch=781, drop_epochs=drop_epochs(config)
  )
  updates = [0] + [781 * drop + late for drop in drops for late in (-1, 0)] + [781 * epochs - 1]
  assert [float(rate(update)) for update in updates] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize(
  ('assignments', 'folder'),
  [
    ((), 'results/tenth'),
    (('model.growth_rate=8',), 'results/tenth-model.growth_rate=8'),
    (('train.epochs=2', 'data.name=a/b'), 'results/tenth-data.name=a_b-train.epochs=2'),
  ],
)
def test_default_folder_names_the_overrides(assignments, folder):
  assert default_workdir(parse_protocol('tenth', assignments)) == folder


def test_overrides_win_over_the_protocol():
  config = run_config(parse_protocol('tenth', ('train.epochs=2', 'loss.exit_weights=(1,2,3)')), 'PN3-x3d', 4)
  assert (config.name, config.seed, config.train.epochs) == ('PN3-x3d', 4, 2.0)
  assert config.loss.exit_weights == (1, 2, 3)
