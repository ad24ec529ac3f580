"""The scripts that start runs elsewhere: the output of their dry runs, and their behavior when a machine is lost."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
SHELLCHECK = pathlib.Path(sys.executable).with_name('shellcheck')
WORKER = 'bash paranet_jax/launch/tpu_worker.sh'
CONFIG = '--config=configs/pn3_ddd.py'
PACK = (
  'tar --create --gzip --file=/tmp/paranet_jax.tar.gz --exclude-vcs --exclude=./.venv --exclude=./.venv-newest '
  '--exclude=./build --exclude=./runs --exclude=./.pytest_cache .'
)
COPY = [
  PACK,
  'gcloud compute tpus tpu-vm scp /tmp/paranet_jax.tar.gz paranet:paranet_jax.tar.gz --worker=all --zone=z',
  'rm /tmp/paranet_jax.tar.gz',
]


def run(script, *arguments, path=None, **env):
  env = {'PATH': path or os.environ['PATH'], 'HOME': '/nowhere', **env}
  command = [shutil.which('bash'), str(REPO / 'launch' / script), *arguments]
  return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def dry_run(script, *arguments, **env):
  result = run(script, '--dry-run', *arguments, **env)
  assert (result.returncode, result.stderr) == (0, '')
  return result.stdout.splitlines()


def ssh(worker, command):
  """The line that runs a command on some workers."""
  return f'gcloud compute tpus tpu-vm ssh paranet --worker={worker} {shlex.quote("--command=" + command)} --zone=z'


def same(lines, expected):
  """Asserts that a shell parses both lists of lines to the same words."""
  assert [shlex.split(line) for line in lines] == [shlex.split(line) for line in expected]


@pytest.mark.skipif(not SHELLCHECK.exists(), reason='needs shellcheck: pip install -r requirements-test.txt')
def test_shellcheck():
  scripts = [*sorted((REPO / 'launch').glob('*.sh')), REPO / '.ci/run']
  result = subprocess.run([SHELLCHECK, '-x', *scripts], cwd=REPO, capture_output=True, text=True, check=False)
  assert (result.returncode, result.stdout) == (0, '')


@pytest.mark.parametrize('script', ['tpu_vm.sh', 'tpu_worker.sh', 'slurm.sh', 'local.sh'])
def test_is_executable(script):
  assert os.access(REPO / 'launch' / script, os.X_OK)


@pytest.mark.parametrize(
  'action, env, expected',
  [
    ('create', {}, 'tpu-vm create paranet --accelerator-type=v5litepod-4 --version=v2-alpha-tpuv5-lite --zone=z'),
    (
      'create',
      {'TYPE': 'v4-16', 'NAME': 'a', 'PROJECT': 'p', 'TIER': 'preemptible'},
      'tpu-vm create a --accelerator-type=v4-16 --version=tpu-ubuntu2204-base --preemptible --zone=z --project=p',
    ),
    (
      'create',
      {'TYPE': 'v6e-16', 'QUEUED': '1', 'TIER': 'spot'},
      'queued-resources create paranet --node-id=paranet --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e '
      '--spot --zone=z',
    ),
    (
      'create',
      {'TYPE': 'v5p-8', 'RUNTIME': 'mine', 'TIER': 'spot'},
      'tpu-vm create paranet --accelerator-type=v5p-8 --version=mine --spot --zone=z',
    ),
    ('delete', {}, 'tpu-vm delete paranet --quiet --zone=z'),
    ('delete', {'QUEUED': '1'}, 'queued-resources delete paranet --force --quiet --zone=z'),
  ],
)
def test_create_and_delete(action, env, expected):
  same(dry_run('tpu_vm.sh', action, ZONE='z', **env), [f'gcloud compute tpus {expected}'])


def test_train():
  lines = dry_run('tpu_vm.sh', 'train', CONFIG, '--config.data.data_dir=a b', ZONE='z', TIER='spot', RUNS='10.0.0.2:/s')
  same(
    lines,
    [
      'gcloud compute tpus tpu-vm create paranet --accelerator-type=v5litepod-4 --version=v2-alpha-tpuv5-lite --spot '
      '--zone=z',
      *COPY,
      ssh('all', 'mkdir -p paranet_jax'),
      ssh('all', 'tar --extract --gzip --file=paranet_jax.tar.gz --directory=paranet_jax'),
      ssh('all', f'{WORKER} install 10.0.0.2:/s'),
      ssh('all', f'{WORKER} start {CONFIG} --config.data.data_dir=a\\ b'),
      ssh('0', f'{WORKER} follow'),
    ],
  )


def test_setup_on_the_disks_of_the_workers():
  lines = dry_run('tpu_vm.sh', 'setup', ZONE='z')
  same(lines[:3], COPY)
  same(lines[-1:], [ssh('all', f'{WORKER} install')])


@pytest.mark.parametrize(
  'arguments, env, message',
  [
    ([], {}, "expected create, setup, run, train, logs or delete, found ''; see the top of launch/tpu_vm.sh"),
    (
      ['start'],
      {},
      "expected create, setup, run, train, logs or delete, found 'start'; see the top of launch/tpu_vm.sh",
    ),
    (['create'], {}, 'ZONE must be set, such as ZONE=us-west4-a'),
    (['create'], {'ZONE': 'z', 'TIER': 'cheap'}, "TIER must be standard, spot or preemptible, found 'cheap'"),
    (
      ['create'],
      {'ZONE': 'z', 'TIER': 'preemptible', 'QUEUED': '1'},
      'a queued VM can be spot but not preemptible; set TIER=spot',
    ),
    (
      ['train'],
      {'ZONE': 'z', 'TIER': 'spot'},
      'a preempted VM loses its disk and the checkpoints on it; set RUNS to an NFS export',
    ),
  ],
)
def test_refusals(arguments, env, message):
  result = run('tpu_vm.sh', '--dry-run', *arguments, **env)
  assert (result.returncode, result.stdout, result.stderr) == (2, '', f'error: {message}\n')


# A stub of gcloud: `state` holds the state of the VM; following its log for the first time changes it and fails.
GCLOUD = """#!{bash}
echo "$*" >>'{root}/log'
case "$*" in
  *' describe '*) cat '{root}/state' 2>/dev/null || exit 1 ;;
  *' create '*) echo READY >'{root}/state' ;;
  *' delete '*) rm '{root}/state' ;;
  *' follow '*)
    if [[ ! -e '{root}/followed' ]]; then
      : >'{root}/followed'
      echo {state} >'{root}/state'
      exit {lost}
    fi ;;
  *' code '*) echo '{kept}' ;;
esac
"""
TWICE = ['start', 'follow'] * 2
RECREATED = ['create', 'install', 'start', 'follow', 'delete', 'create', 'install', 'start', 'follow']


@pytest.mark.parametrize(
  'action, before, state, lost, kept, code, asked',
  [
    ('train', None, 'PREEMPTED', 255, '', 0, RECREATED),
    ('train', None, 'PREEMPTED', 255, 3, 0, RECREATED),
    ('train', None, 'PREEMPTED', 255, 75, 0, RECREATED),
    ('train', 'READY', 'READY', 0, '', 0, ['install', 'start', 'follow']),  # An existing VM is used.
    ('run', 'READY', 'READY', 255, '', 0, TWICE),  # A lost connection is opened again.
    ('run', 'READY', 'READY', 1, 3, 3, ['start', 'follow']),  # A failed run is not restarted,
    ('train', 'READY', 'READY', 1, 3, 3, ['install', 'start', 'follow']),
    ('run', 'READY', 'READY', 1, 75, 75, ['start', 'follow']),
    ('train', None, 'READY', 1, 75, 0, ['create', 'install', *TWICE]),  # but a stopped one is resumed.
  ],
)
def test_what_is_done_when_a_vm_or_a_run_ends(tmp_path, action, before, state, lost, kept, code, asked):
  stub = tmp_path / 'gcloud'
  stub.write_text(GCLOUD.format(bash=shutil.which('bash'), root=tmp_path, state=state, lost=lost, kept=kept))
  stub.chmod(0o755)
  if not before:  # Packing takes a second, and one real archive is enough.
    (tmp_path / 'tar').symlink_to('/bin/true')
  if before:
    (tmp_path / 'state').write_text(f'{before}\n')
  env = {'path': f'{tmp_path}:{os.environ["PATH"]}', 'ZONE': 'z', 'TIER': 'spot', 'RUNS': '1.2.3.4:/s', 'POLL': '0'}
  result = run('tpu_vm.sh', action, CONFIG, **env)
  assert result.returncode == code
  if code == 0:
    assert result.stderr == ('paranet is gone; recreating it\n' if state == 'PREEMPTED' else '')
  words = (tmp_path / 'log').read_text().split()
  assert [word for word in words if word in RECREATED] == asked


def test_no_archive_is_left_where_it_cannot_be_sent(tmp_path):
  (tmp_path / 'gcloud').write_text(f'#!{shutil.which("bash")}\n[[ "$*" != *" scp "* ]]\n')
  (tmp_path / 'gcloud').chmod(0o755)
  (tmp_path / 'tar').symlink_to('/bin/true')
  (tmp_path / 'kept').mkdir()
  env = {'path': f'{tmp_path}:{os.environ["PATH"]}', 'ZONE': 'z', 'TMPDIR': str(tmp_path / 'kept')}
  assert run('tpu_vm.sh', 'setup', **env).returncode == 1
  assert list((tmp_path / 'kept').iterdir()) == []


class Worker:
  """A worker whose Python prints its arguments and ends as the last one says."""

  def __init__(self, folder):
    (folder / 'launch').mkdir(parents=True)
    for name in ('common.sh', 'tpu_worker.sh'):
      shutil.copy(REPO / 'launch' / name, folder / 'launch')
    python = folder / '.venv/bin/python'
    python.parent.mkdir(parents=True)
    python.write_text(
      f'#!{shutil.which("bash")}\nprintf "[%s]" "$@"; echo\nuntil [[ -e go ]]; do sleep 0.05; done\n'
      'case "${@: -1}" in fail) exit 3 ;; stop) echo "stopped by SIGTERM after step 3, saved" ;; esac\n'
    )
    python.chmod(0o755)
    self._folder = folder

  def begin(self, *arguments):
    command = ['bash', 'launch/tpu_worker.sh', *arguments]
    return subprocess.Popen(command, cwd=self._folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

  def act(self, *arguments):
    """Exit code, standard output and standard error."""
    process = self.begin(*arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def let_go(self):
    (self._folder / 'go').touch()


def test_worker(tmp_path):
  workers = {last: (Worker(tmp_path / str(code)), code) for last, code in (('a b', 0), ('fail', 3), ('stop', 75))}
  for last, (worker, _) in workers.items():
    assert worker.act('start', CONFIG, last)[1] == ''
    assert worker.act('start', CONFIG, last)[1].startswith('already running on ')
    assert worker.act('code')[1] == ''
    worker.let_go()
  followers = {last: worker.begin('follow') for last, (worker, _) in workers.items()}  # They wait seconds.
  for last, (worker, code) in workers.items():
    out, _ = followers[last].communicate(timeout=60)
    assert followers[last].returncode == code
    assert out.splitlines()[0] == f'[-m][paranet_jax.main][{CONFIG}][{last}]'
    assert worker.act('code')[1] == f'{code}\n'


def test_worker_rejects_an_unknown_action(tmp_path):
  code, _, err = Worker(tmp_path / 'worker').act('stop')
  assert (code, err) == (2, "error: expected install, start, follow or code, found 'stop'\n")


JOB = """#!/usr/bin/env bash
set -euo pipefail
srun --cpus-per-task={cpus} .venv/bin/python -m paranet_jax.main --workdir={workdir} {arguments}
log={workdir}/slurm-$SLURM_JOB_ID.log
# A run that was resumed with more epochs has the summary of the fewer.
if [[ ! -e {workdir}/summary.json || "$(tail -n 1 "$log")" = 'stopped by '* ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
"""


@pytest.mark.parametrize(
  'env, workdir, options',
  [
    ({}, 'runs/slurm', '--nodes=1 --ntasks-per-node=1 --cpus-per-task=8 --time=24:00:00'),
    (
      {'NODES': '2', 'GPUS': '4', 'CPUS': '6', 'HOURS': '3', 'PARTITION': 'p', 'ACCOUNT': 'a', 'WORKDIR': '/w x'},
      '/w\\ x',
      '--nodes=2 --ntasks-per-node=4 --cpus-per-task=6 --time=3:00:00 --gpus-per-node=4 --partition=p --account=a',
    ),
  ],
)
def test_slurm(env, workdir, options):
  first, command, *job, last = dry_run('slurm.sh', CONFIG, '--config.data.data_dir=a b', **env)
  assert (first, last) == (f'mkdir -p {workdir}', 'JOB')
  assert '\n'.join(job) + '\n' == JOB.format(
    workdir=workdir, cpus=env.get('CPUS', 8), arguments=f'{CONFIG} --config.data.data_dir=a\\ b'
  )
  fixed = f"--job-name=paranet --signal=TERM@120 --requeue --open-mode=append --output={workdir}/slurm-%j.log <<'JOB'"
  assert sorted(shlex.split(command)) == sorted(['sbatch', *shlex.split(options), *shlex.split(fixed)])


@pytest.mark.parametrize(
  'has_summary, last_line, code, requeued',
  [
    (False, 'stopped by SIGTERM after step 3, saved; the same command resumes', 0, True),
    (True, 'stopped by SIGTERM after step 3, saved; the same command resumes', 0, True),  # Resumed with more epochs.
    (True, 'summary: summary.json', 0, False),
    (False, 'error: it failed', 2, False),
  ],
)
def test_slurm_requeues_a_run_that_was_stopped(tmp_path, has_summary, last_line, code, requeued):
  workdir = tmp_path / 'a run'
  workdir.mkdir()
  if has_summary:
    (workdir / 'summary.json').touch()
  _, _, *job, _ = dry_run('slurm.sh', CONFIG, WORKDIR=str(workdir))
  for name, does in (('srun', f'echo "{last_line}"; exit {code}'), ('scontrol', f'echo "$*" >"{tmp_path}/asked"')):
    (tmp_path / name).write_text(f'#!{shutil.which("bash")}\n{does}\n')
    (tmp_path / name).chmod(0o755)
  env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7'}
  with open(workdir / 'slurm-7.log', 'a') as log:  # Slurm appends what the job prints.
    done = subprocess.run(['bash', '-c', '\n'.join(job)], env=env, stdout=log, check=False, timeout=60)
  asked = tmp_path / 'asked'
  assert (done.returncode, asked.read_text() if asked.exists() else '') == (code, 'requeue 7\n' if requeued else '')


@pytest.mark.parametrize(
  'argument', ['--workdir=/elsewhere', '--workdir', '-workdir=/elsewhere', '--mode=eval', '--help', '--helpfull']
)
def test_slurm_rejects_flags_that_would_requeue_forever(argument):
  result = run('slurm.sh', '--dry-run', CONFIG, argument)
  message = f'the job trains in WORKDIR until it is finished, found {argument}; set WORKDIR, and leave the flag out'
  assert (result.returncode, result.stdout, result.stderr) == (2, '', f'error: {message}\n')


def test_slurm_submits_the_printed_job(tmp_path):
  repo = tmp_path / 'repo'
  for name in ('launch/slurm.sh', '.venv/bin/python'):
    (repo / name).parent.mkdir(parents=True, exist_ok=True)
  for name in ('common.sh', 'slurm.sh'):
    shutil.copy(REPO / 'launch' / name, repo / 'launch')
  script = str(repo / 'launch/slurm.sh')
  missing = run(script, CONFIG)
  assert (missing.returncode, missing.stderr) == (
    2,
    'error: expected .venv/bin/python, found none; launch/quickstart.sh creates it\n',
  )
  (repo / '.venv/bin/python').touch(0o755)
  bare = tmp_path / 'bare'
  bare.mkdir()
  (bare / 'dirname').symlink_to(shutil.which('dirname'))
  elsewhere = run(script, CONFIG, path=str(bare))
  message = 'error: sbatch is needed, found none; run this on a login node of a SLURM cluster, or use --dry-run\n'
  assert (elsewhere.returncode, elsewhere.stderr) == (2, message)
  assert not (repo / 'runs').exists()
  sbatch = tmp_path / 'sbatch'
  sbatch.write_text(f'#!{shutil.which("bash")}\nprintf "%q " "$@" >"{tmp_path}/asked"; cat >"{tmp_path}/job"\n')
  sbatch.chmod(0o755)
  result = run(script, CONFIG, path=f'{tmp_path}:{os.environ["PATH"]}')
  assert (result.returncode, result.stdout, result.stderr) == (0, '', '')
  _, command, *job, _ = dry_run(script, CONFIG)
  assert (tmp_path / 'job').read_text().splitlines() == job
  assert shlex.split((tmp_path / 'asked').read_text()) == shlex.split(command)[1:-1]
  assert (repo / 'runs/slurm').is_dir()


LOCAL = (
  'env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={devices} .venv/bin/python -m paranet_jax.main '
  "--config=configs/pn3_ddd.py '--workdir=a b' "
  '--coordinator=localhost:{port} --num_processes={processes} --process_id={index} &'
)


@pytest.mark.parametrize('processes, devices', [(2, 1), (3, 4)])
def test_local(processes, devices):
  env = {} if (processes, devices) == (2, 1) else {'PROCESSES': str(processes), 'DEVICES': str(devices)}
  lines = dry_run('local.sh', CONFIG, '--workdir=a b', PORT='7777', **env)
  expected = {'processes': processes, 'devices': devices, 'port': 7777}
  same(lines, [LOCAL.format(index=index, **expected) for index in range(processes)])


@pytest.mark.parametrize(
  'env, message',
  [
    ({'PROCESSES': 'two'}, "PROCESSES must be an integer of 1 or more, found 'two'"),
    ({'DEVICES': '0'}, "DEVICES must be an integer of 1 or more, found '0'"),
    ({'PYTHON': 'no-python'}, 'expected no-python, found none; launch/quickstart.sh creates .venv'),
    ({'PYTHON': '/no/python'}, 'expected /no/python, found none; launch/quickstart.sh creates .venv'),
  ],
)
def test_local_rejects(env, message):
  result = run('local.sh', CONFIG, **env)
  assert (result.returncode, result.stdout, result.stderr) == (2, '', f'error: {message}\n')


def local(tmp_path, program):
  """Starts launch/local.sh with a shell program in place of Python; `$index` is the last argument."""
  python = tmp_path / 'python'
  python.write_text(f'#!{shutil.which("bash")}\nindex="${{!#}}"\n{program}\n')
  python.chmod(0o755)
  env = {'PATH': os.environ['PATH'], 'PYTHON': str(python), 'PROCESSES': '3'}
  return subprocess.Popen(
    [REPO / 'launch/local.sh', CONFIG], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


@pytest.fixture(scope='module', autouse=True)
def one_fails(tmp_path_factory):
  """Waits for 5 seconds, and so it begins before the other tests, and the last test looks at its end."""
  process = local(tmp_path_factory.mktemp('one_fails'), '[[ "$index" = --process_id=1 ]] && exit 3; exec sleep 600')
  yield process
  process.terminate()  # Not killed: its processes would go on and hold the pipes, if the last test has not waited.
  process.communicate()


def test_local_finds_a_python_by_its_name(tmp_path):
  python = tmp_path / 'my-python'
  python.write_text(f'#!{shutil.which("bash")}\necho "$0"\n')
  python.chmod(0o755)
  result = run('local.sh', CONFIG, path=f'{tmp_path}:{os.environ["PATH"]}', PYTHON='my-python', PROCESSES='1')
  assert (result.returncode, result.stdout, result.stderr) == (0, f'{python}\n', '')


def test_local_passes_a_signal_on(tmp_path):
  program = 'trap "echo stopping $index; exit 0" TERM; echo ready; while true; do sleep 0.05; done'
  process = local(tmp_path, program)
  assert [process.stdout.readline() for _ in range(3)] == ['ready\n'] * 3
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (0, '')
  assert sorted(out.splitlines()) == [f'stopping --process_id={index}' for index in range(3)]


def test_local_kills_at_the_second_signal(tmp_path):
  process = local(tmp_path, 'trap "echo stopping" TERM; echo ready; while true; do sleep 0.05; done')
  assert [process.stdout.readline() for _ in range(3)] == ['ready\n'] * 3
  process.send_signal(signal.SIGTERM)
  assert [process.stdout.readline() for _ in range(3)] == ['stopping\n'] * 3
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGKILL


def test_image_copies_what_exists():
  lines = (REPO / 'launch/docker/Dockerfile').read_text().splitlines()
  sources = [word for line in lines if line.startswith('COPY') for word in line.split()[1:-1]]
  ignored = (REPO / 'launch/docker/Dockerfile.dockerignore').read_text().splitlines()
  for source in sources:
    assert list(REPO.glob(source)) and f'!{source}' in ignored
  assert (REPO / 'requirements-tpu.txt').exists() and (REPO / 'requirements-cuda.txt').exists()


def test_local_ends_with_the_first_that_fails(one_fails):
  one_fails.communicate(timeout=60)
  assert one_fails.returncode == 3
