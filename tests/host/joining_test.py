"""How processes join, what is refused before, and how the watch ends them; nothing is trained."""

import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from running import QUICKSTART, refusal, run_command

from paranet_jax import devices, seeds
from paranet_jax.calibrate import __main__ as calibrate
from paranet_jax.host import processes
from paranet_jax.host.errors import UserError
from paranet_jax.host.watch import Place
from paranet_jax.plan import __main__ as plan
from paranet_jax.predict import __main__ as predict
from paranet_jax.runs.record import RunRecord

REPO = Path(__file__).resolve().parents[2]
SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[01-02]',
  'SLURM_NTASKS': '4',
  'SLURM_PROCID': '1',
  'SLURM_LOCALID': '0',
}
OPEN_MPI = {
  'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.0.0.1:7',
  'OMPI_COMM_WORLD_SIZE': '3',
  'OMPI_COMM_WORLD_RANK': '2',
}
ALL = ('--coordinator=a:1', '--num_processes=2', '--process_id=1')


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (
      ALL[:2],
      '--coordinator, --num_processes and --process_id go together, found a:1, 2 and None; set all of them, or none '
      'where the cluster provides them',
    ),
    (
      ['--num_processes=2'],
      '--coordinator, --num_processes and --process_id go together, found None, 2 and None; set all of them, or none '
      'where the cluster provides them',
    ),
    (['--coordinator=a', *ALL[1:]], '--coordinator must be HOST:PORT, found a'),
    ([*ALL[:2], '--process_id=2'], '--process_id must be from 0 to --num_processes - 1, found 2 of 2'),
    ([*ALL[:2], '--process_id=-1'], '--process_id must be from 0 to --num_processes - 1, found -1 of 2'),
    (
      ['--heartbeat_timeout=1000001'],
      '--heartbeat_timeout and --num_processes must be at most 1,000,000, found more',
    ),
    (['--heartbeat_timeout=4'], '--heartbeat_timeout must be 5 seconds or more, found 4'),
    (
      [*ALL, '--mode=describe'],
      '--mode=describe runs in one process; remove --coordinator, --num_processes and --process_id',
    ),
  ],
)
def test_flags(flags, message):
  assert refusal(QUICKSTART, *flags) == message


def set_env(monkeypatch, env):
  for name, value in env.items():
    monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
  ('env', 'found'), [({}, None), (SLURM, ('slurm', 4)), (OPEN_MPI, ('ompi', 3)), ({'SLURM_NTASKS': '4'}, None)]
)
def test_the_cluster(monkeypatch, env, found):
  set_env(monkeypatch, env)
  assert processes.cluster() == found


def test_a_jax_that_does_not_say_which_cluster_it_finds(monkeypatch):
  set_env(monkeypatch, SLURM)
  monkeypatch.delattr('jax._src.clusters.ClusterEnv._cluster_types')
  assert processes.cluster() is None


@pytest.mark.parametrize(
  ('env', 'place'),
  [({}, Place()), (SLURM | {'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, Place()), (SLURM, Place(None, 1, None))],
)
def test_alone_nothing_is_joined(monkeypatch, env, place):
  set_env(monkeypatch, env)
  monkeypatch.setattr(jax.distributed, 'initialize', None)
  out = sys.stdout
  with processes.joined(place, 100):
    assert processes.Coordinator().count == 1 and sys.stdout is out


@pytest.mark.parametrize(
  ('place', 'env', 'asked'),
  [
    (Place('a:1', 2, 1), SLURM, ('a:1', 2, 1, {'cluster_detection_method': 'deactivate'})),
    (Place(), SLURM, (None, None, None, {'cluster_detection_method': None})),
  ],
)
def test_joining_takes_the_flags_or_what_the_cluster_says(monkeypatch, place, env, asked):
  def initialize(*arguments, heartbeat_timeout_seconds, initialization_timeout, **options):
    assert (heartbeat_timeout_seconds, initialization_timeout) == (30, processes.JOIN_SECONDS)
    assert (*arguments, options) == asked
    raise RuntimeError('no\n  way')

  set_env(monkeypatch, env)
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(UserError) as error, processes.joined(place, 30):
    pass
  assert str(error.value) == (
    'the processes cannot join (no way); set --coordinator, --num_processes and --process_id, or --num_processes=1 to '
    'train alone'
  )


@pytest.mark.parametrize(
  ('name', 'command', 'arguments'),
  [
    ('plan', plan.main, [QUICKSTART]),
    ('calibrate', calibrate.main, ['--workdir=none', '--threshold=0.5']),
    ('predict', predict.main, ['--workdir=none', __file__]),
  ],
)
def test_single_process_commands_refuse_a_cluster(monkeypatch, name, command, arguments):
  set_env(monkeypatch, SLURM)
  code, out, err = run_command(command, *arguments)
  assert (code, out) == (2, '')
  assert err == f'error: {name} runs in one process, found 4 started by slurm; start one, with one task\n'


def test_several_seeds(monkeypatch, tmp_path):
  monkeypatch.setattr(seeds, 'Coordinator', lambda: types.SimpleNamespace(count=2))
  assert refusal(QUICKSTART, '--config.seeds=2', f'--workdir={tmp_path}') == (
    'several seeds are trained in one process, found 2 processes; set --config.seeds=1, or start one process'
  )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('asked', 'each', 'found'),
  [
    (0, (2, 2), [(0, 0), (0, 1), (1, 0), (1, 1)]),
    (2, (2, 3), [(0, 0), (1, 0)]),
    (3, (2, 2), '2 processes must have as many devices each, found [2, 2] and train.devices 3; '
                'set --config.train.devices to a multiple of 2'),
    (0, (2, 1), '2 processes must have as many devices each, found [2, 1] and train.devices 0; '
                'set --config.train.devices to a multiple of 2'),
    (6, (2, 2), 'train.devices asks for 6 devices and 2 processes of 2 are here; set --config.train.devices'),
  ],
)  # fmt: skip
def test_devices_of_several_processes(monkeypatch, asked, each, found):
  """The same number from each process, in the order of processes, however jax lists them."""
  here = [types.SimpleNamespace(process_index=p, number=n) for n in range(3) for p in (1, 0) if n < each[p]]
  monkeypatch.setattr(jax, 'devices', lambda: here)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  if isinstance(found, str):
    with pytest.raises(UserError) as error:
      devices.pick_devices(asked)
    assert str(error.value) == found
    return
  picked = devices.pick_devices(asked)
  assert [(device.process_index, device.number) for device in picked] == found
  assert devices.of_this_process(picked) == picked[len(picked) // 2 :]


class Left:
  """Replaces a watch."""

  def leave(self, done):
    assert not done


@pytest.mark.parametrize(
  ('wrap', 'first', 'printed'),
  [
    (UserError, True, 'error: no\n'),
    (UserError, False, 'error: process 1 of 2: no\n'),
    (lambda text: processes.reported_once(UserError(text)), True, 'error: no\n'),
    (lambda text: processes.reported_once(UserError(text)), False, ''),
  ],
)
def test_an_error_in_all_processes_is_reported_once(monkeypatch, capsys, wrap, first, printed):
  codes = []
  coordinator = types.SimpleNamespace(is_first=first, index=int(not first), count=2)
  monkeypatch.setattr(os, '_exit', codes.append)
  processes._end(wrap('no'), Left(), coordinator)
  assert (codes, capsys.readouterr().err) == ([2], printed)


def test_a_process_that_does_not_save_names_the_checkpoint_that_was_restored():
  record = object.__new__(RunRecord)
  record.saved_step, record._checkpoints = 6, None
  with pytest.raises(UserError, match='at step 9, and the last checkpoint is of step 6; '):
    record.log(9, {1: float('nan')}, {'loss': float('nan')})


def python(program, *arguments):
  return subprocess.Popen(
    [sys.executable, '-c', program, *map(str, arguments)],
    cwd=REPO,
    env=os.environ | {'PYTHONPATH': str(REPO)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def free_port():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]


def test_the_others_do_not_join():
  program = """
import sys
from paranet_jax.host import processes
from paranet_jax.host.watch import Place
processes.JOIN_SECONDS = 1
with processes.joined(Place(sys.argv[1], 2, 1), 10):
  pass
"""
  place = f'localhost:{free_port()}'
  process = python(program, place)
  _, err = process.communicate(timeout=120)
  assert (process.returncode, err.splitlines()[-1]) == (
    2,
    f'error: the other processes did not join at {place} within 1 s; start all of them with the same --coordinator, '
    'where process 0 must be reachable, or set --num_processes=1 to train alone',
  )


MEMBER = """
import sys, time
from paranet_jax.host import watch as watch_lib
watch_lib._GRACE = 0.5
index, port = map(int, sys.argv[1:])
watch = watch_lib.Watch(index, 3, heartbeat_timeout=2)
if index == 0:
  print(watch.listen(), flush=True)
else:
  assert watch.connect(['nowhere.invalid', 'localhost'], port)
  print('connected', flush=True)
how = sys.stdin.readline().strip()
if how:
  watch.leave(done=how == 'done')
else:
  time.sleep(100)
"""


@pytest.fixture
def members():
  """Three processes that only run a watch."""
  first = python(MEMBER, 0, 0)
  port = int(first.stdout.readline())
  others = [python(MEMBER, index, port) for index in (1, 2)]
  assert [process.stdout.readline() for process in others] == ['connected\n'] * 2
  with socket.create_connection(('localhost', port)) as stranger:
    stranger.sendall(b'GET / HTTP/1.1\n')
  yield [first, *others]
  for process in (first, *others):
    process.kill()
    process.communicate()


# A stopped process stands for a machine that died: its connections stay open, and it is silent.
@pytest.mark.parametrize(
  ('victim', 'number'), [(0, signal.SIGKILL), (2, signal.SIGKILL), (0, signal.SIGSTOP), (2, signal.SIGSTOP)]
)
def test_the_watch_names_the_process_that_died(members, victim, number):
  members[victim].send_signal(number)
  for index in {0, 1, 2} - {victim}:
    process = members[index]
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert err == (
      f'error: process {victim} of 3 (host {socket.gethostname()}, pid {members[victim].pid}) is gone, and so all end; '
      'start all of them again: the run resumes from its last checkpoint\n'
    )


def test_process_0_cannot_be_reached():
  program = f"""
from paranet_jax.host.watch import Watch
print(Watch(1, 2, 5).connect(['nowhere.invalid', 'localhost'], {free_port()}))
"""
  assert python(program).communicate(timeout=60) == ('False\n', '')


def test_process_0_that_dies_before_it_answers_is_not_reached():
  """It would be known neither that nor who died."""
  program = """
import sys
from paranet_jax.host.watch import Watch
print(Watch(1, 2, 5).connect(['localhost'], int(sys.argv[1])), flush=True)
"""
  with socket.create_server(('localhost', 0)) as server:
    process = python(program, server.getsockname()[1])
    server.accept()[0].close()
    assert process.communicate(timeout=60) == ('False\n', '')


def send(process, how):
  process.stdin.write(f'{how}\n')
  process.stdin.flush()


def test_a_process_that_is_done_ends_no_other(members):
  for process in members:
    send(process, 'done')
    assert (process.wait(timeout=60), process.stderr.read()) == (0, '')


def has_failed(process, index):
  return (
    f'error: process {index} of 3 (host {socket.gethostname()}, pid {process.pid}) reported an error and has '
    'ended, and so all end\n'
  )


def test_processes_that_fail_together_end_alone_and_the_rest_with_a_line(members):
  send(members[0], 'failed')
  send(members[1], 'failed')
  assert [process.wait(timeout=60) for process in members] == [0, 0, 1]
  assert [process.stderr.read() for process in members] == ['', '', has_failed(members[0], 0)]


def test_process_0_outlives_the_others_after_its_own_failure(members):
  send(members[0], 'failed')
  for process in members[1:]:
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == has_failed(members[0], 0)
  assert members[0].poll() is None
  assert members[0].wait(timeout=60) == 0


def test_process_0_passes_on_the_failure_of_another(members):
  send(members[2], 'failed')
  assert [process.wait(timeout=60) for process in members] == [1, 1, 0]
  assert [process.stderr.read() for process in members] == [has_failed(members[2], 2)] * 2 + ['']
