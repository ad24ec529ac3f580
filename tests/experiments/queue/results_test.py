"""Tests of what a queue tells: its table, estimated times and results, against numbers computed by hand."""

import dataclasses
import json
import re
import shlex

import pytest
from queues import FakeQueue, write_run

from paranet_jax.base_config import base_config
from paranet_jax.costs import describe
from paranet_jax.experiments.protocols import reductions
from paranet_jax.experiments.queue import state
from paranet_jax.experiments.queue.estimate import seconds_left, status_table
from paranet_jax.experiments.queue.file import read_queue
from paranet_jax.experiments.queue.record import RunRecord, read_records
from paranet_jax.experiments.queue.results import markdown, results, write_results
from paranet_jax.experiments.queue.state import run_state
from paranet_jax.host.errors import UserError

QUEUE = """
set = { train.epochs = 4, data.name = 'digits', model.layers_per_block = 1, eval.every_epochs = 1 }
[[runs]]
name = 'plain'
config = 'paranet_jax:paranet:PN1-d'
seeds = [0, 1, 2]
[[runs]]
name = 'better'
config = 'paranet_jax:paranet:PN1-d'
set = { train.nesterov = false }
seeds = [3, 1, 2, 0]
[[runs]]
name = 'larger'
config = 'paranet_jax:paranet:PN1-d'
set = { model.growth_rate = 24 }
[[comparisons]]
question = 'Is it better?'
control = 'plain'
treated = ['better']
exit = 1
"""


@pytest.fixture
def queue(tmp_path):
  """plain-s0, plain-s1 and better-s1 are finished; plain-s2 and better-s2 are at epochs 2 and 3."""
  fake = FakeQueue(tmp_path, QUEUE)
  for name, epoch in (('plain-s0', 4), ('plain-s1', 4), ('plain-s2', 2), ('better-s1', 4), ('better-s2', 3)):
    fake.write(name, epoch)
  path = fake.workdir / 'runs' / 'better-s1' / 'metrics.jsonl'
  path.write_text(path.read_text().replace('0.15', '0.5'))
  return fake


@pytest.mark.parametrize('below', [True, False])
def test_commands_are_for_a_shell(tmp_path, monkeypatch, below):
  here = tmp_path / 'of' / 'another'
  here.mkdir(parents=True)
  monkeypatch.chdir(tmp_path.parent if below else here)
  fake = FakeQueue(tmp_path, QUEUE.replace("data.name = 'digits'", "data.name = 'digits', loss.exit_weights = [10]"))
  read = read_queue(fake.path)
  for run in read.runs:
    fake.write(run.name, 2)
  found = results(read, fake.workdir, {})
  for run, told in zip(read.runs, found['runs'], strict=True):
    assert any('(' in argument for argument in run.arguments)
    workdir = f'{tmp_path.name}/work' if below else fake.workdir
    command = ['python', '-m', 'paranet_jax.main', *run.arguments, f'--workdir={workdir}/runs/{run.name}']
    assert shlex.split(told['command']) == command


@pytest.mark.parametrize(
  ('path', 'shown'),
  [
    ('runs/other', 'runs/other'),
    ('/elsewhere{here}/other', '/elsewhere{here}/other'),  # The same names below another folder.
  ],
)
def test_paths_in_rows_are_from_here(tmp_path, monkeypatch, path, shown):
  monkeypatch.chdir(tmp_path)
  path = f"data.name = 'digits', init_from = '{path.format(here=tmp_path)}'"
  fake = FakeQueue(tmp_path, QUEUE.replace("data.name = 'digits'", path))
  fake.write('plain-s0', 4)
  found = results(read_queue(fake.path), fake.workdir, {})
  assert f"init_from: '' -> {shown.format(here=tmp_path)}" in found['rows'][0]['reduced']


def test_results(queue):
  found = results(read_queue(queue.path), queue.workdir, {})
  rows = [{key: row[key] for key in ('run', 'seeds', 'epoch', 'partial')} for row in found['rows']]
  assert rows == [
    {'run': 'plain', 'seeds': [0, 1], 'epoch': 4, 'partial': False},
    {'run': 'plain', 'seeds': [2], 'epoch': 2, 'partial': True},
    {'run': 'better', 'seeds': [1], 'epoch': 4, 'partial': False},
    {'run': 'better', 'seeds': [2], 'epoch': 3, 'partial': True},
  ]
  assert [row['ours'] for row in found['rows']] == pytest.approx([14.5, 14, 50, 15])
  assert found['rows'][0]['std'] == pytest.approx(0.5**0.5) and found['rows'][1]['std'] is None
  assert found['rows'][0]['each_seed'] == pytest.approx([14, 15])
  # What changes no parameter is no reduction.
  assert found['rows'][2]['reduced'] == [
    'data.name: cifar100 -> digits',
    'model.layers_per_block: 16 -> 1',
    'train.epochs: 130.0 -> 4.0',
    'train.nesterov: True -> False',
  ]
  (compared,) = found['comparisons']
  assert (compared['seeds'], compared['mean'], compared['std']) == ([1], pytest.approx(35), None)
  # Both have epoch 2, with equal accuracies.
  assert compared['partial'] == [{'seed': 2, 'epoch': 2, 'difference': 0}]


@pytest.mark.parametrize(
  ('schedule', 'expected'),
  [
    ('step', ['train.drop_factor: 0.1 -> 0.2', f'train.drops: ({50 / 130}, {100 / 130}) -> (0.5, 0.75)']),
    ('one_cycle', ['train.schedule: step -> one_cycle']),
    ('constant', ['train.schedule: step -> constant']),
  ],
)
def test_drops_differ_from_the_paper_only_where_the_schedule_drops(schedule, expected):
  config = base_config()
  config.train.update(schedule=schedule, drops=(0.5, 0.75), drop_factor=0.2)
  assert reductions(config) == expected


def test_runs_that_have_no_epoch_in_common_are_not_compared(queue):
  queue.write('better-s0', 0)
  (compared,) = results(read_queue(queue.path), queue.workdir, {})['comparisons']
  assert (compared['seeds'], [row['seed'] for row in compared['partial']]) == ([1], [2])
  path = queue.workdir / 'runs' / 'better-s0' / 'metrics.jsonl'
  path.write_text('{"step": 15, "epoch": 1.5, "split": "test", "exit_1/accuracy": 0.5}\n')
  (compared,) = results(read_queue(queue.path), queue.workdir, {})['comparisons']
  assert (compared['seeds'], [row['seed'] for row in compared['partial']]) == ([1], [2])


def test_markdown(queue):
  write_results(read_queue(queue.path), queue.workdir, {})
  text = (queue.workdir / 'results.md').read_text().replace(' \\\n  ', ' ')
  reduced = 'data.name: cifar100 -> digits; model.layers_per_block: 16 -> 1; train.epochs: 130.0 -> 4.0'
  lines = [line for line in text.splitlines() if line.startswith(('| plain', '| better - '))]
  counts = re.search(r'\| 4 \| ([\d,]+ \| [\d,]+) \|', text)[1]
  assert lines[:3] == [
    f'| plain | 1 | — | 14.50 +- 0.71 | 0, 1 | 4 | {counts} | {reduced} |',
    f'| plain | 1 | — | 14.00 | 2 | **partial: 2 of 4** | {counts} | {reduced} |',
    '| better - plain | 1 | +35.00 | +35.00 | seed 2 at epoch 2: +0.00 |',
  ]
  assert '--config.train.nesterov=False --config.seed=1 --workdir=' in text


def test_fields_that_change_no_result_may_differ_between_seeds(tmp_path):
  path = tmp_path / 'queue.toml'
  path.write_text(
    "[[runs]]\nname = 'x'\nconfig = 'paranet_jax:quickstart'\nseeds = [0, 1]\nset = { model.dtype = 'bfloat16' }\n"
  )
  queue = read_queue(path)
  for run, dtype, workers in zip(queue.runs, ('bfloat16!', 'float32'), (0, 2), strict=True):
    config = run.config.copy_and_resolve_references()
    config.model.dtype, config.data.workers, config.log.every_steps = dtype, workers, 7 + workers
    write_run(tmp_path / 'runs' / run.name, config, 60)
  found = results(queue, tmp_path, {run.name: RunRecord(list(run.arguments), 'code', None) for run in queue.runs})
  assert found['left_out'] == [] and {tuple(row['seeds']) for row in found['rows']} == {(0, 1)}


def test_held_out_accuracies_have_a_column(queue):
  for name, accuracy in (('plain-s0', 0.3), ('plain-s1', 0.4)):
    with (queue.workdir / 'runs' / name / 'metrics.jsonl').open('a') as file:
      for epoch in (3, 4):
        line = {'step': 10 * epoch, 'epoch': float(epoch), 'split': 'held_out', 'exit_1/accuracy': accuracy * epoch / 4}
        file.write(json.dumps(line) + '\n')
  found = results(read_queue(queue.path), queue.workdir, {})
  assert [row['held_out'] for row in found['rows']] == [pytest.approx(35), None, None, None]
  header, _, first, second, *_ = [line for line in markdown(found).splitlines() if line.startswith('|')]
  assert header.startswith('| run | exit | paper (%) | ours (%) | held out (%) | seeds | ')
  assert first.startswith('| plain | 1 | — | 14.50 +- 0.71 | 35.00 | 0, 1 | ')
  assert second.startswith('| plain | 1 | — | 14.00 | — | 2 | ')


def test_published_accuracies_and_nothing_measured(tmp_path):
  fake = FakeQueue(
    tmp_path, QUEUE.replace("name = 'larger'", "name = 'larger'\npaper = 'PN3cut-ddd'").replace('digits', 'cifar100')
  )
  queue = read_queue(fake.path)
  assert 'Nothing has been measured yet.' in markdown(results(queue, fake.workdir, {}))
  fake.write('larger-s0', 1)
  (row,) = results(queue, fake.workdir, {})['rows']
  assert (row['paper'], row['paper_std'], row['partial']) == (50.39, 0.248, True)
  assert '| larger | 1 | 50.39 +- 0.248 | 11.00 | 0 | **partial: 1 of 4** | ' in markdown(
    results(queue, fake.workdir, {})
  )


def test_a_run_on_images_without_labels_is_left_out(queue):
  path = queue.workdir / 'runs' / 'plain-s0' / 'metrics.jsonl'
  path.write_text(path.read_text().replace('exit_1/accuracy', 'exit_1/agreement'))
  found = results(read_queue(queue.path), queue.workdir, {})
  assert found['left_out'] == ['plain-s0: it has no accuracies, as its images have no labels']
  assert found['rows'][0]['seeds'] == [1]


def test_a_run_that_is_another_one_is_left_out(queue):
  records = {'plain-s0': RunRecord(['--config.train.epochs=5'], 'code', None)}
  found = results(read_queue(queue.path), queue.workdir, records)
  assert found['rows'][0]['seeds'] == [1]
  assert found['left_out'][0].startswith('plain-s0: it began with --config.train.epochs=5, and the file has ')
  assert 'Left out: plain-s0: ' in markdown(found)


@pytest.mark.parametrize(
  ('edit', 'why'),
  [
    (('', ''), None),
    (('epochs = 4', 'epochs = 5'), 'steps: 40 -> 50'),
    # A second layer: 36 x 48 + 9 x 48 x 12 weights, 2 x (36 + 48) of its norms, and an exit of 12 channels more.
    (('layers_per_block = 1', 'layers_per_block = 2'), 'params of exit 1: 7570 -> 14794'),
    (('PN1-d', 'PN2-dx'), 'name: PN1-d -> PN2-dx'),
  ],
)
def test_results_that_were_kept_without_a_configuration_are_compared_with_the_file(tmp_path, edit, why):
  fake = FakeQueue(tmp_path, QUEUE)
  run = next(run for run in read_queue(fake.path).runs if run.name == 'plain-s0')
  fake.write(run.name, 4)
  folder = fake.workdir / 'runs' / run.name
  (folder / 'config.json').unlink()
  summary = json.loads((folder / 'summary.json').read_text())
  told = describe(run.config)
  exits = [cost | measured for cost, measured in zip(told['exits'], [{'accuracy': 0.14}], strict=True)]
  (folder / 'summary.json').write_text(json.dumps(summary | told | {'exits': exits}))
  fake.path.write_text(QUEUE.replace(*edit))
  found = results(read_queue(fake.path), fake.workdir, {})
  if why is None:
    assert (found['left_out'], [row['seeds'] for row in found['rows']]) == ([], [[0]])
  else:
    assert found['rows'] == [] and why in found['left_out'][0], found['left_out']
  # Arguments that the queue recorded tell more, such as another learning rate.
  record = RunRecord(['--config.train.epochs=7'], 'code', None)
  assert (
    'it began with --config.train.epochs=7'
    in results(read_queue(fake.path), fake.workdir, {run.name: record})['left_out'][0]
  )


def test_a_configuration_file_that_was_edited_between_two_seeds(tmp_path):
  file = tmp_path / 'mine.py'
  text = 'from paranet_jax.configs import quickstart\n\n\ndef get_config():\n  config = quickstart.get_config()\n'
  text += '  config.data.name, config.eval.every_epochs = "digits", 1\n'
  rest = '  config.train.epochs, config.model.layers_per_block = 4, {}\n  return config\n'
  file.write_text(text + rest.format(1))
  path = tmp_path / 'queue.toml'
  path.write_text(f"[[runs]]\nname = 'x'\nconfig = '{file}'\nseeds = [0, 1]\n")
  write_run(tmp_path / 'runs' / 'x-s0', read_queue(path).runs[0].config, 4)
  before = results(read_queue(path), tmp_path, {})['rows']
  file.write_text(text + rest.format(3))
  queue = read_queue(path)
  write_run(tmp_path / 'runs' / 'x-s1', queue.runs[1].config, 4)
  records = {run.name: RunRecord(list(run.arguments), 'code', None) for run in queue.runs}
  found = results(queue, tmp_path, records)
  assert found['rows'] == before  # Described by its own configuration, whatever the file says by now.
  assert found['left_out'] == [
    'x-s1: it has other fields than x-s0: model.layers_per_block: 1 -> 3; give them different names in the file'
  ]


def test_estimated_times(queue):
  runs = read_queue(queue.path).runs
  # A finished run took 80 s for 4 epochs; a running one of 10 steps of 64 images reads 20 images/s.
  left = seconds_left(runs, {run.name: run_state(queue.workdir, run.name) for run in runs})
  larger = left.pop('larger-s0')
  assert left == {
    'plain-s0': 0,
    'plain-s1': 0,
    'plain-s2': 2 * 32,
    'better-s3': 4 * 32,
    'better-s1': 0,
    'better-s2': 32,
    'better-s0': 4 * 32,
  }
  # The stem and the layer have twice the channels: between twice and four times the work, at 20 s an epoch.
  assert 4 * 20 * 2 < larger < 4 * 20 * 4


@pytest.mark.parametrize(
  ('at_once', 'left'),
  [
    # In the order of training: 128, 64, 32 and 128 seconds.
    (1, '5 min 52 s'),
    (2, '3 min 44 s, 2 at once'),  # 128, and beside it 64 + 32 + 128.
    (3, '2 min 40 s, 3 at once'),  # 32 + 128.
    (9, '2 min 08 s, 9 at once'),  # No run is faster on more cores than its own.
  ],
)
def test_time_until_the_last_of_several_at_once_ends(queue, at_once, left):
  read = read_queue(queue.path)
  read = dataclasses.replace(read, runs=tuple(run for run in read.runs if run.row != 'larger'))
  last = status_table(read, queue.workdir, {}, at_once).splitlines()[-1]
  assert last == f'left: {left} (estimated from what has been trained)'


def test_a_run_that_the_queue_will_refuse(queue, monkeypatch):
  def row(name, records):
    table = status_table(read_queue(queue.path), queue.workdir, records, 2)
    lines = [re.split('  +', line) for line in table.splitlines() if line.startswith(name)]
    return [cells[2:] for cells in lines[:1]] + [line for (line,) in lines[1:]]

  why = 'plain-s2 failed: it began with --config.train.epochs=5, and the file has '
  records = {'plain-s2': RunRecord(['--config.train.epochs=5'], 'code', None)}
  cells, told = row('plain-s2', records)
  assert cells == ['refused', '2.0 of 4', '1: 14.00', '—'] and told.startswith(why)
  # One that trains goes on.
  monkeypatch.setattr(state, 'lock_holder', lambda folder: 'process 7 on here' if folder.name == 'plain-s2' else '')
  assert row('plain-s2', records) == [['running (process 7)', '2.0 of 4', '1: 14.00', '1 min 04 s']]


def test_a_run_that_trains_now(queue, monkeypatch):
  monkeypatch.setattr(state, 'lock_holder', lambda folder: 'process 7 on here' if folder.name == 'plain-s2' else '')
  lines = status_table(read_queue(queue.path), queue.workdir, {}).splitlines()
  (line,) = (line for line in lines if line.startswith('plain-s2 '))
  assert re.split('  +', line)[2:4] == ['running (process 7)', '2.0 of 4']


def test_status_table(queue):
  read = read_queue(queue.path)
  queue.work(start=lambda *_: pytest.fail('trained'), cores=[])
  lines = status_table(read, queue.workdir, {'larger-s0': RunRecord([], '', None, failed='no data')}).splitlines()
  # All first seeds come first, then the second ones.
  assert [line.split()[0] for line in lines[1:9]] == [
    *('plain-s0', 'better-s3', 'larger-s0', 'plain-s1', 'better-s1', 'plain-s2', 'better-s2', 'better-s0')
  ]
  rows = [re.split('  +', line) for line in lines]
  assert [rows[place][:5] for place in (0, 1, 4, 6)] == [
    ['run', 'priority', 'state', 'epoch', 'test accuracy (%)'],
    ['plain-s0', '100', 'finished', '4.0 of 4', '1: 14.00'],
    ['plain-s1', '100', 'finished', '4.0 of 4', '1: 15.00'],
    ['plain-s2', '100', 'stopped at step 20', '2.0 of 4', '1: 14.00'],
  ]
  assert rows[6][5] == '1 min 04 s' and rows[2][2] == 'waiting'
  assert lines[-2] == 'larger-s0 failed: no data' and lines[-1].startswith('left: ')


def test_no_speed_is_known(tmp_path):
  fake = FakeQueue(tmp_path, QUEUE)
  assert status_table(read_queue(fake.path), fake.workdir, {}).splitlines()[-1] == (
    'left: 0 s, and 8 runs of which no speed is known yet (estimated from what has been trained)'
  )


def test_most_steps_end_a_run(tmp_path):
  fake = FakeQueue(tmp_path, QUEUE.replace('train.epochs = 4', 'train.epochs = 4, train.max_steps = 25'))
  queue = read_queue(fake.path)
  write_run(fake.workdir / 'runs' / 'plain-s0', queue.runs[0].config, 2)
  states = {run.name: run_state(fake.workdir, run.name) for run in queue.runs}
  assert seconds_left(queue.runs[:1], states) == {'plain-s0': 0.5 * 32}
  assert '2.0 of 2.5' in status_table(queue, fake.workdir, {}).splitlines()[1]
  assert results(queue, fake.workdir, {})['rows'][0]['epochs'] == 2.5


def test_a_finished_run_that_is_trained_further_is_not_finished(queue):
  (queue.workdir / 'runs' / 'plain-s0' / 'checkpoints' / '50').mkdir()
  rows = results(read_queue(queue.path), queue.workdir, {})['rows']
  assert [(row['seeds'], row['partial']) for row in rows[:2]] == [([1], False), ([0], True)]
  assert 'stopped at step 50' in status_table(read_queue(queue.path), queue.workdir, {}).splitlines()[1]


@pytest.mark.parametrize('lines', [0, 6])
def test_a_finished_run_whose_last_accuracies_are_lost_is_left_out(queue, lines):
  path = queue.workdir / 'runs' / 'plain-s0' / 'metrics.jsonl'
  path.write_text(''.join(path.read_text().splitlines(keepends=True)[:lines]))  # 6 of 8: up to epoch 3.
  found = results(read_queue(queue.path), queue.workdir, {})
  assert found['rows'][0]['seeds'] == [1] and [run['run'] for run in found['runs']][0] == 'plain-s1'
  assert found['left_out'] == [
    'plain-s0: it is finished, but metrics.jsonl lacks its last accuracies; restore that file'
  ]


def test_a_run_that_lost_its_number_of_classes_stops_no_queue(tmp_path):
  fake = FakeQueue(tmp_path, QUEUE.replace("data.name = 'digits'", "data.name = 'folder', data.data_dir = '/nowhere'"))
  fake.write('plain-s0', 2)
  queue = read_queue(fake.path)
  found = results(queue, fake.workdir, {})
  assert found['rows'] == [] and [run['run'] for run in found['runs']] == ['plain-s0']
  assert [line.partition(' of data set')[0] for line in found['left_out']] == ['plain: the number of classes']
  # 64 s are left of plain-s0 and 128 s of each of its other seeds; nothing is known of the other five runs.
  assert status_table(queue, fake.workdir, {}).splitlines()[-1].startswith('left: 5 min 20 s, and 5 runs of which no')


def test_lines_that_no_run_wrote_are_ignored(queue):
  before = results(read_queue(queue.path), queue.workdir, {})
  with (queue.workdir / 'runs' / 'plain-s0' / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 40, "note": "mine"}\n')
  assert results(read_queue(queue.path), queue.workdir, {}) == before
  assert '4.0 of 4' in status_table(read_queue(queue.path), queue.workdir, {}).splitlines()[1]


@pytest.mark.parametrize(
  'record',
  [
    {'code': 1, 'more': 2},
    *({'arguments': [], 'code': '', 'commit': None, 'starts': starts} for starts in ([{}], [3], [{'versions': []}], 3)),
  ],
)
def test_damaged_records(tmp_path, record):
  (tmp_path / 'queue.json').write_text(json.dumps({'runs': {'a': record}}))
  with pytest.raises(UserError, match=r'queue.json is damaged \(.*; restore it, or move it away: runs then go on with'):
    read_records(tmp_path)
