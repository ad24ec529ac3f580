"""Tests of the table of methods, from the results of a queue as they would be read from JSON."""

import json

import pytest
from running import CONFIGS, run_command

from paranet_jax.experiments import __main__ as experiments
from paranet_jax.experiments.methods import methods_markdown
from paranet_jax.experiments.queue.file import read_queue
from paranet_jax.host.errors import UserError

EPOCHS = 'train.epochs: 130.0 -> 30.0'


def row(run, number, each, seeds=(0, 1), partial=False, reduced=(EPOCHS,), **more):
  mean, std = sum(each) / len(each), 1.5 if len(each) > 1 else None
  return {
    **{'run': run, 'network': run.partition('-')[0].upper(), 'exit': number, 'seeds': list(seeds), 'ours': mean},
    **{'std': std, 'each_seed': list(each), 'epoch': 30.0, 'epochs': 30.0, 'partial': partial},
    **{'macs': 12_345_678 * number, 'reduced': list(reduced)},
    **more,
  }


FOUND = {
  'queue': 'methods.toml',
  'date': '2026-01-02',
  'rows': [
    row('net-plain', 1, (50, 52)),
    row('net-plain', 2, (60, 62)),
    row('net-dfs', 1, (53,), (1,), reduced=(EPOCHS, 'loss.own_channels: 0.0 -> 0.5')),
    row('net-dfs', 2, (61.5,), (1,), reduced=(EPOCHS, 'loss.own_channels: 0.0 -> 0.5')),
    row('net-dfs', 1, (40,), (0,), True, epoch=5.0),
    row('net-dfs', 2, (45,), (0,), True, epoch=5.0),
    row('net-last', 2, (63,), (0,)),  # It trains no other exit.
    row('other-mixed', 1, (70,), (0,)),
    row('unrelated', 1, (99,)),
  ],
}


def cells(line):
  return [cell.strip() for cell in line.strip('|').split('|')]


def test_one_table_for_each_network():
  """Seed 1 of dfs has 53 - 52 and 61.5 - 62 more than plain; seed 0 is at epoch 5; the other network has no plain."""
  text = methods_markdown(FOUND)
  assert [line for line in text.splitlines() if line.startswith('#')] == [
    *('# Methods of training several exits, 2026-01-02', '## NET', '## OTHER'),
  ]
  found = [cells(line) for line in text.splitlines() if line.startswith('|')]
  assert found == [
    ['method', 'seeds', 'epochs', 'exit 1', 'exit 2', 'fields (default -> here)'],
    ['---'] * 6,
    ['multiply-adds, M', '', '', '12.3', '24.7', ''],
    ['plain', '0, 1', '30', '51.00 +- 1.50', '61.00 +- 1.50', ''],
    ['dfs', '1', '30', '53.00 (+1.00)', '61.50 (-0.50)', 'loss.own_channels: 0.0 -> 0.5'],
    ['dfs', '0', '**partial: 5 of 30**', '40.00', '45.00', ''],
    ['last', '0', '30', '—', '63.00 (+3.00)', ''],
    ['method', 'seeds', 'epochs', 'exit 1', 'fields (default -> here)'],
    ['---'] * 5,
    ['multiply-adds, M', '', '', '12.3', ''],
    ['mixed', '0', '30', '70.00', ''],
  ]
  assert text.count(f'All rows (default -> here): {EPOCHS}.') == 2
  assert '99' not in text
  assert 'Nothing has been measured yet.' in methods_markdown(FOUND | {'rows': []})


def test_methods_of_networks_that_cost_differently():
  rows = [row('net-plain', 1, (50,), (0,)), row('net-wide', 1, (52,), (0,), macs=99_000_000)]
  assert '| multiply-adds, M |  |  | 12.3 to 99.0 |  |' in methods_markdown(FOUND | {'rows': rows})


def test_the_command_writes_the_table_beside_the_results(tmp_path):
  (tmp_path / 'results.json').write_text(json.dumps(FOUND))
  result = run_command(experiments.main, 'methods', f'--workdir={tmp_path}')
  assert (result.code, result.err) == (0, '')
  assert (tmp_path / 'methods.md').read_text() == methods_markdown(FOUND)
  assert result.out == f'{methods_markdown(FOUND)}\nwritten: {tmp_path}/methods.md\n'


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (
      None,
      'error: expected results.json of a queue in {path}, found none; write it by `python -m paranet_jax.experiments '
      'run configs/queues/methods.toml --write`, or set --workdir\n',
    ),
    (
      '{"rows": 1}',
      'error: {path}/results.json is not of a queue (TypeError("\'int\' object is not iterable")); set --wo',
    ),
    ('{', 'error: {path}/results.json is not a JSON object'),
  ],
)
def test_results_that_cannot_be_read(tmp_path, content, message):
  if content:
    (tmp_path / 'results.json').write_text(content)
  result = run_command(experiments.main, 'methods', f'--workdir={tmp_path}')
  assert result.code == 2 and result.err.startswith(message.format(path=tmp_path)), result.err


def test_rows_that_are_named_otherwise():
  with pytest.raises(UserError) as error:
    methods_markdown(FOUND | {'rows': FOUND['rows'][-1:]})
  assert str(error.value) == (
    "expected rows named NETWORK-METHOD, found 'unrelated' in results.json of methods.toml; name them so, or set "
    '--workdir'
  )


@pytest.mark.parametrize('name, epochs, seeds', [('methods', 30, (0, 1)), ('methods_short', 3, (0,))])
def test_the_queues_have_every_method_of_every_network(name, epochs, seeds):
  queue = read_queue(CONFIGS / 'queues' / f'{name}.toml')
  methods = ('plain', 'equilibrium', 'mixed', 'distillation', 'dfs', 'boostnet')
  expected = {f'{network}-{method}-s{seed}' for network in NETWORKS for method in methods for seed in seeds}
  assert {run.name for run in queue.runs} == expected
  for run in queue.runs:
    assert (run.config.train.epochs, run.config.train.schedule) == (epochs, 'one_cycle')
  assert {(run.config.model.family, run.config.model.get('num_blocks')) for run in queue.runs} == {
    *(('msdnet', 7), ('ranet', None), ('paranet', None)),
  }


def test_plain_training_comes_first():
  queue = read_queue(CONFIGS / 'queues' / 'methods.toml')
  assert [run.row.partition('-')[2] for run in queue.runs][:6] == ['plain'] * 6


def test_the_short_queue_trains_by_the_same_methods():
  long, short = (read_queue(CONFIGS / 'queues' / f'{name}.toml') for name in ('methods', 'methods_short'))
  chosen = {run.name: run.config for run in long.runs}
  for run in short.runs:
    assert run.config.loss.to_dict() == chosen[run.name].loss.to_dict(), run.name
    assert run.config.train.regime == chosen[run.name].train.regime, run.name
    assert run.config.model.boost == chosen[run.name].model.boost, run.name


NETWORKS = ('msdnet', 'ranet', 'paranet')
