"""Tests of `python -m paranet_jax.experiments` on the smoke protocol: reuse, resuming, the files and the errors."""

import json
import os
import re
import shlex
import shutil
import signal

import pytest
from running import CONFIGS, PROGRAMS, Result, before_each_step, contents, run_command

from paranet_jax import train as train_lib
from paranet_jax.command_line import parse
from paranet_jax.costs import describe
from paranet_jax.experiments import __main__ as experiments
from paranet_jax.experiments import planned_runs as runs_lib
from paranet_jax.experiments import speed as speed_lib
from paranet_jax.experiments.protocols import PROTOCOLS, Protocol
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import write_json
from paranet_jax.runs.workdir import prepare_workdir, restore_config, save_config

NAMES = ['PN3cut-ddd', 'PN3-ddd', 'PN3-xdx', 'PN3-x3d']
STEPS = 116  # 1,437 training images in batches of 48 are 29 steps an epoch.
FILES = {'results.json', 'table1.md', 'table2.md', 'figure2.png'}
# Runs of 3 steps with networks that compile faster, for tests of what is trained and kept.
SET = ('--set=log.every_steps=1', '--set=model.blocks=(1,1,1)', '--set=model.image_side=8', '--set=train.max_steps=3')
SHORT = ('--protocol=smoke', *SET)


@pytest.fixture(scope='module', autouse=True)
def _programs():
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(CONFIGS.parent)
    PROGRAMS.install(patch)
    yield


def run_experiments(*arguments) -> Result:
  return run_command(experiments.main, *arguments)


def refusal(*arguments, started=False) -> str:
  code, out, err = run_experiments(*arguments)
  assert code == 2 and bool(out) == started and err.startswith('error: ') and err.count('\n') == 1, (code, out, err)
  return err[len('error: ') : -1]


def fake_training(config, workdir, *_):
  """Writes a finished run without training: exit p of seed s is right on 10 p + s of 360 images."""
  prepare_workdir(workdir, config, accept_changes=False)
  save_config(workdir, config)
  description = describe(config)
  right = {'accuracy': None, 'top5': None, 'loss': 1.0, 'nll': 1.0}
  exits = [row | right | {'accuracy': (10 * row['exit'] + config.seed) / 360} for row in description['exits']]
  device = {'platform': 'cpu', 'kind': 'cpu', 'count': 1}
  summary = description | {'steps': 116, 'exits': exits, 'versions': {}, 'device': device, 'wall_time_s': 61.0}
  write_json(workdir / 'summary.json', summary)
  return summary


@pytest.fixture(scope='module')
def smoke(_programs, tmp_path_factory):
  """The folder and the output of the whole smoke protocol, without training."""
  workdir = tmp_path_factory.mktemp('smoke')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_lib, 'train_and_evaluate', fake_training)
    result = run_experiments('all', '--protocol=smoke', f'--workdir={workdir}')
  assert (result.code, result.err) == (0, ''), result
  return workdir, result.out


@pytest.fixture(scope='module')
def short(_programs, tmp_path_factory):
  """The folder of short runs for table 2."""
  workdir = tmp_path_factory.mktemp('short')
  assert run_experiments('table2', *SHORT, f'--workdir={workdir}').code == 0
  return workdir


@pytest.fixture
def copied(short, tmp_path):
  """A copy of the short runs, which a test may change."""
  return shutil.copytree(short, tmp_path / 'copy')


def results(workdir, experiment):
  return json.loads((workdir / 'results.json').read_text())['experiments'][experiment]


def timeless(section):
  """The section without wall times."""
  return section | {'runs': [run | {'wall_time_s': None} for run in section['runs']]}


def fail(*unused):
  raise AssertionError('a step was trained')


def test_smoke_writes_everything(smoke):
  workdir, out = smoke
  assert {path.name for path in workdir.iterdir()} == FILES | {'runs'}
  assert sorted(path.name for path in (workdir / 'runs').iterdir()) == sorted(f'{name}-s0' for name in NAMES)
  assert [line for line in out.splitlines() if line.startswith('run ')] == [
    f'run {number} of 4: {name}-s0' for number, name in enumerate(NAMES, 1)
  ]
  for name in ('table1.md', 'table2.md'):
    assert (workdir / name).read_text() in out
  assert (workdir / 'figure2.png').read_bytes().startswith(b'\x89PNG\r\n\x1a\n')


@pytest.mark.parametrize(
  ('experiment', 'rows'),
  [
    ('table1', [(name, number) for name in ('PN3cut-ddd', 'PN3-ddd') for number in (1, 2, 3)]),
    ('table2', [('PN3-xdx', 2), ('PN3-x3d', 2)]),
    ('figure2', [('PN3-ddd', 1), ('PN3-ddd', 2), ('PN3-ddd', 3)]),
  ],
)
def test_results_match_the_summaries(smoke, experiment, rows):
  workdir, _ = smoke
  section = results(workdir, experiment)
  assert [(row['network'], row['exit']) for row in section['rows']] == rows
  for row in section['rows']:
    summary = json.loads((workdir / 'runs' / f'{row["network"]}-s0' / 'summary.json').read_text())
    measured = summary['exits'][row['exit'] - 1]
    assert row['ours'] == 100 * measured['accuracy'] and row['std'] is None
    assert (row['macs'], row['params']) == (measured['macs'], measured['params'])
    assert row['difference'] == pytest.approx(row['ours'] - row['paper'])


def test_commands_reproduce_the_runs(smoke):
  workdir, _ = smoke
  for run in results(workdir, 'table1')['runs']:
    python, m, module, *arguments = shlex.split(run['command'])
    assert (python, m, module) == ('python', '-m', 'paranet_jax.main')
    values, config = parse(['main', *arguments])
    assert values.workdir == f'{workdir}/runs/{run["run"]}'
    assert config.to_json() == restore_config(workdir / 'runs' / run['run']).to_json()


def test_finished_runs_are_not_trained_again(smoke, monkeypatch):
  workdir, _ = smoke
  before_each_step(monkeypatch, fail)
  before = contents(workdir)
  assert run_experiments('all', '--protocol=smoke', f'--workdir={workdir}').code == 0
  assert contents(workdir) == before


def test_more_seeds_keep_existing_runs_and_other_experiments(short, copied, monkeypatch):
  trained = []
  before_each_step(monkeypatch, lambda step, state: trained.append((int(state.seed), step)))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_lib, 'train_and_evaluate', fake_training)
    assert run_experiments('figure2', *SHORT, '--seeds=1', f'--workdir={copied}').code == 0
  assert run_experiments('table2', *SHORT, '--seeds=2', f'--workdir={copied}').code == 0
  assert trained == [(1, step) for step in range(3)] * 2
  assert results(copied, 'figure2')['seeds'] == [0]
  assert results(copied, 'table2')['seeds'] == [0, 1]
  for row, earlier in zip(results(copied, 'table2')['rows'], results(short, 'table2')['rows'], strict=True):
    assert row['each_seed'][:1] == earlier['each_seed']


def test_two_tables_at_the_same_time_are_both_kept(_programs, tmp_path, monkeypatch):
  table2 = 'table2', '--protocol=smoke', f'--workdir={tmp_path}'

  def train(config, workdir, *_):
    monkeypatch.setattr(train_lib, 'train_and_evaluate', fake_training)
    assert run_experiments(*table2).code == 0  # While the first run of table1 trains.
    return fake_training(config, workdir)

  monkeypatch.setattr(train_lib, 'train_and_evaluate', train)
  assert run_experiments('table1', *table2[1:]).code == 0
  assert {run['run'] for run in results(tmp_path, 'table1')['runs']} == {'PN3cut-ddd-s0', 'PN3-ddd-s0'}
  assert {run['run'] for run in results(tmp_path, 'table2')['runs']} == {'PN3-xdx-s0', 'PN3-x3d-s0'}


def test_stopped_after_every_step(short, tmp_path, monkeypatch):
  """The tables are the same, and no step is trained twice."""
  arguments = ('table2', *SHORT, f'--workdir={tmp_path}')
  trained = []

  def stop(step, state):
    trained.append(step)
    os.kill(os.getpid(), signal.SIGTERM)

  before_each_step(monkeypatch, stop)
  for _ in range(10):
    result = run_experiments(*arguments)
    if result.code == 0:
      break
    assert (result.code, result.err) == (130, '')
    assert not (tmp_path / 'table2.md').exists()
  # A signal during a run's last step is too late to stop it, so the next run begins.
  assert trained == [0, 1, 2] * 2
  assert timeless(results(tmp_path, 'table2')) == json.loads(
    json.dumps(timeless(results(short, 'table2'))).replace(str(short), str(tmp_path))
  )


def test_killed_between_a_run_and_the_tables(short, tmp_path, monkeypatch):
  arguments = ('table2', *SHORT, f'--workdir={tmp_path}')
  shutil.copytree(short / 'runs', tmp_path / 'runs')
  before_each_step(monkeypatch, fail)

  def killed(*unused):
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('paranet_jax.experiments.results.write_text', killed)
    assert run_experiments(*arguments)[::2] == (130, 'stopped at once; the same command resumes\n')
  assert run_experiments(*arguments).code == 0
  assert results(tmp_path, 'table2')['rows'] == results(short, 'table2')['rows']


def test_dry_run_lists_the_runs_and_writes_nothing(short, tmp_path, monkeypatch):
  shutil.copytree(short / 'runs' / 'PN3-xdx-s0', tmp_path / 'runs' / 'PN3-xdx-s0')
  shutil.copytree(short / 'runs' / 'PN3-x3d-s0', tmp_path / 'runs' / 'PN3-x3d-s0')
  (tmp_path / 'runs' / 'PN3-x3d-s0' / 'summary.json').unlink()
  measured = []

  def measure(config):
    measured.append(config.name)
    return speed_lib.Speed(start=10.0, step=2.0, evaluation=5.0, total_steps=3, evaluation_steps=29)

  monkeypatch.setattr(speed_lib, 'measure', measure)
  before = contents(tmp_path)
  result = run_experiments('table2', *SHORT, '--seeds=2', f'--workdir={tmp_path}', '--dry-run')
  assert (result.code, result.err) == (0, '') and contents(tmp_path) == before
  # 3 steps of 2 s, one evaluation of 5 s, and 10 s to start.
  assert [re.split('  +', line) for line in result.out.splitlines()[:5]] == [
    ['run', 'state', 'time left'],
    ['PN3-xdx-s0', 'finished', '—'],
    ['PN3-x3d-s0', 'stopped at step 3', '10 s'],
    ['PN3-xdx-s1', 'missing', '21 s'],
    ['PN3-x3d-s1', 'missing', '21 s'],
  ]
  assert result.out.splitlines()[-1] == 'total: 52 s'
  assert measured == ['PN3-x3d', 'PN3-xdx']


@pytest.mark.parametrize(
  ('step', 'expected'),
  [(0, 10 + 100 * 2 + 4 * 5), (29, 10 + 71 * 2 + 3 * 5), (57, 10 + 43 * 2 + 3 * 5), (99, 10 + 2 + 5), (100, 10)],
)
def test_time_left(step, expected):
  speed = speed_lib.Speed(start=10, step=2, evaluation=5, total_steps=100, evaluation_steps=29)
  assert speed.seconds_left(step) == expected


def test_measurement(_programs):
  (run, *_) = runs_lib.plan_runs(
    ['table2'], Protocol('smoke', {'model.blocks': '(1,1,1)', 'model.image_side': '8'}), 1, CONFIGS
  )
  speed = speed_lib.measure(run.config)
  assert (speed.total_steps, speed.evaluation_steps) == (STEPS, 29)
  assert min(speed.start, speed.step, speed.evaluation) > 0


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('table3',), "argument experiment: invalid choice: 'table3' (choose from "),
    ((), 'the following arguments are required: experiment; see --help'),
    (('all', '--sets=1'), 'unrecognized arguments: --sets=1; see --help'),
    (
      ('all', '--seeds=' + '9' * 5000),
      f'argument --seeds: expected an integer from 1 to 10,000, found {"9" * 40}; see --help',
    ),
    (('all', '--seeds=0'), 'argument --seeds: expected an integer of 1 or more, found 0; see --help'),
    (('all', '--protocol=short'), "argument --protocol: invalid choice: 'short' (choose from "),
    (
      ('all', '--set=model.depth'),
      "expected --set=field=value, such as --set=model.layers_per_block=4, found 'model.depth'",
    ),
    (
      ('all', '--set=model.layers_per_blok=4'),
      'unknown configuration field model.layers_per_blok; did you mean model.layers_per_block? All are in '
      'paranet_jax/base_config.py',
    ),
    (('all', '--set=train.epochs=0'), 'train.epochs must be more than 0 and at most 1,000,000, found 0.0; '
     'set --set=train.epochs'),
    (('all', '--set=seed=3'), 'seed differs between the runs, found --set=seed=3; leave it out, or set --seeds'),
  ],
)  # fmt: skip
def test_rejected_arguments(tmp_path, arguments, message):
  assert refusal(*arguments, f'--workdir={tmp_path}/new').startswith(message)
  assert not contents(tmp_path)


def test_protocol_flag_offers_every_protocol():
  assert all(experiments._parse(['all', f'--protocol={name}']) for name in PROTOCOLS)


@pytest.mark.parametrize('dry', [(), ('--dry-run',)])
@pytest.mark.parametrize(
  ('arguments', 'found'),
  [
    (('--protocol=smoke',), '--protocol=smoke'),
    (('--protocol=tenth', *SET), f'--protocol=tenth {" ".join(SET)}'),
    (('--protocol=smoke', '--set=train.max_steps=4'), '--protocol=smoke --set=train.max_steps=4'),
  ],
)
def test_folder_with_another_protocol(short, arguments, found, dry):
  before = contents(short)
  assert refusal('table2', *arguments, f'--workdir={short}', *dry) == (
    f'{short} holds results of {" ".join(SHORT)}, found {found}; set --workdir to another folder'
  )
  assert contents(short) == before


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('table1.md', 'mine', '{0} holds table1.md but no results.json, so this command did not write it; set --workdir'),
    ('config.json', '{}', '{0} holds config.json but no results.json, so this command did not write it; set --workdir'),
    ('queue.json', '{}', '{0} holds queue.json but no results.json, so this command did not write it; set --workdir'),
    ('results.json', '{"seed"', '{0}/results.json is not a JSON object (Expecting'),
    ('results.json', '{"queue": "a.toml"}', '{0} holds results of a queue, found --protocol=smoke'),
    ('results.json', '{}', "{0}/results.json is damaged (KeyError('protocol')); restore it, or "),
  ],
)
def test_foreign_folder(tmp_path, name, content, message):
  (tmp_path / name).write_text(content)
  assert refusal('table2', *SHORT, f'--workdir={tmp_path}').startswith(message.format(tmp_path))
  assert contents(tmp_path) == {name: content.encode()}


def test_run_with_another_configuration(copied):
  run = copied / 'runs' / 'PN3-xdx-s0'
  config = json.loads((run / 'config.json').read_text())
  (run / 'config.json').write_text(json.dumps(config | {'seed': 7}))
  assert refusal('table2', *SHORT, f'--workdir={copied}') == (
    f'{run} holds a run with a different configuration: seed: 7 -> 0 (saved -> now); set --workdir'
  )


def test_kept_results_of_another_protocol(copied):
  for run in (copied / 'runs').iterdir():
    for path in run.iterdir():
      if path.name not in ('summary.json', 'metrics.jsonl'):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
  (copied / 'results.json').unlink()
  for path in copied.glob('table2.md'):
    path.unlink()
  before = contents(copied)
  run = copied / 'runs' / 'PN3-xdx-s0'
  more = tuple(field.replace('max_steps=3', 'max_steps=4') for field in SHORT)
  assert refusal('table2', *more, f'--workdir={copied}') == (
    f'{run} holds a run with a different configuration: steps: 3 -> 4 (saved -> now); set --workdir'
  )
  assert {path: text for path, text in contents(copied).items() if path != 'results.json'} == before
  (copied / 'results.json').unlink()
  assert run_experiments('table2', *SHORT, f'--workdir={copied}').code == 0  # Nothing is left to train.


def test_failing_run_is_named(tmp_path, monkeypatch):
  def fail(*unused):
    raise UserError('the loss is no longer finite; lower --config.train.learning_rate')

  monkeypatch.setattr(train_lib, 'train_and_evaluate', fail)
  assert refusal('table2', *SHORT, f'--workdir={tmp_path}', started=True) == (
    'run PN3-xdx-s0: the loss is no longer finite; lower --set=train.learning_rate'
  )


def test_damaged_summary(copied):
  path = copied / 'runs' / 'PN3-xdx-s0' / 'summary.json'
  for content in ('{}', '{"steps": 3}', path.read_text().replace('"accuracy"', '"x"')):
    path.write_text(content)
    assert refusal('table2', *SHORT, f'--workdir={copied}').startswith(
      f'{path} is not the summary of a run (it holds {{'
    )


def test_run_that_continued_after_its_summary_is_unfinished(copied):
  path = copied / 'runs' / 'PN3-xdx-s0' / 'summary.json'
  summary = json.loads(path.read_text())
  path.write_text(json.dumps(summary | {'steps': 2}))
  assert run_experiments('table2', *SHORT, f'--workdir={copied}').code == 0
  assert json.loads(path.read_text())['steps'] == 3


@pytest.mark.parametrize('flags', [(), ('--accept_data_changes',)])
def test_changed_data_is_accepted_as_the_messages_say(tmp_path, monkeypatch, flags):
  asked = []

  def stopped(config, workdir, title, accepted):
    asked.append((accepted.data, '--accept_data_changes' in title))

  monkeypatch.setattr(runs_lib, 'train_missing', stopped)
  assert run_experiments('table2', '--protocol=smoke', f'--workdir={tmp_path}', *flags).code == 130
  assert asked == [(bool(flags), bool(flags))]


def test_the_place_of_the_data(tmp_path):
  runs = runs_lib.plan_runs(['table2'], Protocol('smoke', {}), 1, tmp_path, tmp_path / 'my images')
  assert {run.config.data.data_dir for run in runs} == {f'{tmp_path}/my images'}
  assert all(shlex.split(run.command)[-1] == f'--data_dir={tmp_path}/my images' for run in runs)
  runs[0].workdir.mkdir(parents=True)
  save_config(runs[0].workdir, runs[0].config)
  elsewhere = runs_lib.plan_runs(['table2'], Protocol('smoke', {}), 1, tmp_path, tmp_path / 'elsewhere')
  assert str(runs_lib.status(elsewhere[0])) == 'missing'
