"""The setup and test scripts, run in a copy of the repository with a stub for Python: nothing is installed."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = (
  'launch/common.sh',
  'launch/venv.sh',
  'launch/quickstart.sh',
  'launch/test.sh',
  'launch/test_slow.sh',
  'launch/test_newest.sh',
  '.ci/run',
)
INSTALL_RUN_TIME = 'pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt'
INSTALL_TEST = 'pip install --quiet --disable-pip-version-check -r requirements-test.txt -c constraints.txt'
QUICKSTART = 'paranet_jax.main --config=configs/quickstart.py'
PYTEST = 'pytest -q --durations=10 --numprocesses=2 --dist=loadfile'

# Runs `-c CODE` like a Python of the given version, creates a venv that holds itself, and logs every other command.
# A file named broken-MODULE next to the log makes that module fail.
STUB = """#!{bash}
if [[ "$1" = -c ]]; then
  [[ "$2" != *ensurepip* || ! -e '{root}/broken-venv' ]] || exit 1
  exec '{python}' -Sc 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2"
fi
shift
if [[ "$*" = 'pip --version' ]]; then
  [[ -e "${{0%/bin/python}}/pip" ]]
  exit
fi
printf -v line ' %q' "$@"
echo "${{line:1}}" >>'{root}/log'
[[ ! -e "{root}/broken-$1" ]] || exit 1
case "$1" in
  venv) mkdir -p "$3/bin" && cp '{python3}' "$3/bin/python" ;;
  ensurepip) : >"${{0%/bin/python}}/pip" ;;
esac
"""


class Sandbox:
  """A copy of the scripts, and a PATH with a stub of Python and the few tools that the scripts call."""

  def __init__(self, root: pathlib.Path):
    self.root, self.repo, self.bin = root, root / 'a repo', root / 'bin'
    self.bash = shutil.which('bash')
    self.bin.mkdir()
    for tool in ('bash', 'cat', 'cp', 'dirname', 'mkdir', 'mktemp', 'rm'):
      (self.bin / tool).symlink_to(shutil.which(tool))
    for name in (
      *SCRIPTS,
      'constraints.txt',
      'constraints-newest.txt',
      *(path.name for path in REPO.glob('requirements*.txt')),
    ):
      (self.repo / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(REPO / name, self.repo / name)

  def add_python(self, version: tuple[int, ...] = (3, 11, 7), name: str = 'python3') -> None:
    path = self.bin / name
    path.write_text(
      STUB.format(bash=self.bash, root=self.root, python=sys.executable, python3=path, version=version), newline='\n'
    )
    path.chmod(0o755)

  def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    """Runs a script from outside the repository."""
    env = {'PATH': str(self.bin), 'TMPDIR': str(self.root), **env}
    command = [self.bash, str(self.repo / script), *args]
    return subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, check=False)

  def log(self) -> list[str]:
    log = self.root / 'log'
    return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def sandbox(tmp_path):
  return Sandbox(tmp_path)


@pytest.fixture
def ready(sandbox):
  """A sandbox in which the quickstart has run."""
  sandbox.add_python()
  assert sandbox.run('launch/quickstart.sh').returncode == 0
  (sandbox.root / 'log').unlink()
  return sandbox


def assert_refused(result: subprocess.CompletedProcess, message: str) -> None:
  assert result.stderr.splitlines()[-1] == f'error: {message}'
  assert result.returncode == 2


@pytest.mark.parametrize(
  'script', ['launch/quickstart.sh', 'launch/test.sh', 'launch/test_slow.sh', 'launch/test_newest.sh', '.ci/run']
)
def test_is_executable(script):
  assert os.access(REPO / script, os.X_OK)


def test_first_run_creates_the_venv_and_installs(sandbox):
  sandbox.add_python()
  result = sandbox.run('launch/quickstart.sh', '--workdir=a b', '--config.seed=1')
  assert result.returncode == 0
  assert result.stderr == 'Installing requirements.txt into .venv ...\n'
  assert sandbox.log() == [
    'venv --without-pip .venv',
    'ensurepip --default-pip',
    INSTALL_RUN_TIME,
    rf'{QUICKSTART} --workdir=a\ b --config.seed=1',
  ]


def test_variables_of_others_are_not_taken_for_folders(sandbox):
  sandbox.add_python()
  others = {'VENV': str(sandbox.root / 'other'), 'CONSTRAINTS': '/nowhere'}
  result = sandbox.run('launch/quickstart.sh', **others)
  assert (result.returncode, result.stderr) == (0, 'Installing requirements.txt into .venv ...\n')
  assert not (sandbox.root / 'other').exists() and sandbox.log()[-2:] == [INSTALL_RUN_TIME, QUICKSTART]


def test_later_runs_install_only_what_is_missing(ready):
  for script in ('quickstart', 'test', 'quickstart', 'test'):
    assert ready.run(f'launch/{script}.sh').returncode == 0
  assert ready.log() == [QUICKSTART, INSTALL_TEST, PYTEST, QUICKSTART, PYTEST]


@pytest.mark.parametrize('file', ['requirements.txt', 'constraints.txt'])
def test_changed_requirements_are_installed(ready, file):
  with open(ready.repo / file, 'a') as f:
    f.write('another==1.0\n')
  ready.run('launch/quickstart.sh')
  ready.run('launch/quickstart.sh')
  assert ready.log() == [INSTALL_RUN_TIME, QUICKSTART, QUICKSTART]


def test_failed_install_is_reported_and_completed_by_the_next_run(sandbox):
  sandbox.add_python()
  broken = sandbox.root / 'broken-pip'
  broken.touch()
  assert_refused(
    sandbox.run('launch/quickstart.sh'),
    'pip could not install requirements.txt (its reason is above; installing needs a network). '
    'Run this again to resume.',
  )
  broken.unlink()
  assert sandbox.run('launch/quickstart.sh').returncode == 0
  assert sandbox.log()[2:] == [INSTALL_RUN_TIME, INSTALL_RUN_TIME, QUICKSTART]


@pytest.mark.parametrize('lost', ['bin', 'pip'])
def test_incomplete_venv_is_completed(ready, lost):
  (ready.repo / '.venv/mine').touch()
  if lost == 'bin':
    shutil.rmtree(ready.repo / '.venv/bin')
    expected = ['venv --without-pip .venv', QUICKSTART]
  else:
    (ready.repo / '.venv/pip').unlink()
    expected = ['ensurepip --default-pip', QUICKSTART]
  assert ready.run('launch/quickstart.sh').returncode == 0
  assert ready.log() == expected
  assert (ready.repo / '.venv/mine').exists()


@pytest.mark.parametrize(
  ('pythons', 'env', 'found'),
  [
    ({}, {}, 'none that runs among python3.13 python3.12 python3.11 python3'),
    ({'python3': (3, 9, 18)}, {}, 'python3 (3.9)'),
    ({'python3.11': (3, 10, 1), 'python3': (2, 7, 18)}, {}, 'python3.11 (3.10) python3 (2.7)'),
    ({'python3': (3, 13, 0), 'mine': (3, 8, 0)}, {'PYTHON': 'mine'}, 'mine (3.8)'),
    ({'python3': (3, 13, 0)}, {'PYTHON': 'mine'}, 'none that runs among mine'),
  ],
)
def test_python_that_is_too_old(sandbox, pythons, env, found):
  for name, version in pythons.items():
    sandbox.add_python(version, name)
  script = sandbox.repo / 'launch/test.sh'
  assert_refused(
    sandbox.run('launch/test.sh', **env),
    f'Python 3.11 or newer is needed; found: {found}. '
    f'Install one, or name it: PYTHON=/path/to/python3.11 bash {script}',
  )
  assert not (sandbox.repo / '.venv').exists()


def test_python_that_only_prints_an_error_is_skipped(sandbox):
  shim = sandbox.bin / 'python3.13'
  shim.write_text(f'#!{sandbox.bash}\necho "python3.13: command not found" >&2\nexit 127\n')
  shim.chmod(0o755)
  sandbox.add_python()
  result = sandbox.run('launch/quickstart.sh')
  assert result.returncode == 0
  assert 'command not found' not in result.stderr


def test_missing_venv_module(sandbox):
  sandbox.add_python()
  (sandbox.root / 'broken-venv').touch()
  assert_refused(
    sandbox.run('launch/quickstart.sh'),
    'python3 cannot create virtual environments: its venv module is missing '
    '(Debian, Ubuntu: apt install python3-venv).',
  )


def test_pip_that_cannot_be_installed(sandbox):
  sandbox.add_python()
  (sandbox.root / 'broken-ensurepip').touch()
  assert_refused(
    sandbox.run('launch/quickstart.sh'),
    'pip is needed in .venv; ensurepip could not install it (Debian, Ubuntu: apt install python3-venv).',
  )


@pytest.mark.parametrize(('version', 'found'), [(None, 'one that no longer runs'), ((3, 10, 0), '3.10')])
def test_venv_with_an_unusable_python_is_kept(ready, version, found):
  python = ready.repo / '.venv/bin/python'
  python.unlink()
  if version:
    ready.add_python(version, 'old')
    shutil.copy(ready.bin / 'old', python)
  else:
    python.symlink_to(ready.root / 'removed')
  assert_refused(
    ready.run('launch/quickstart.sh'),
    f'Python 3.11 or newer is needed in .venv; found: {found}. Move .venv away and run this again.',
  )
  assert ready.log() == []
  assert (ready.repo / '.venv/installed-requirements.txt').exists()


def test_slow_tests_end_with_a_soak(ready):
  ready.run('launch/test.sh')
  (ready.root / 'log').unlink()
  assert ready.run('launch/test_slow.sh', '-x', KILLS='3').returncode == 0
  assert ready.log() == ['pytest -q --durations=10 tests/slow -x', '--minutes=1 --kills=3']


@pytest.mark.parametrize('by_pyenv', [True, False])
def test_newest_jax(ready, by_pyenv):
  ready.add_python((3, 12, 1), 'python3.13')  # Not what its name says.
  result = ready.run('launch/test_newest.sh')
  assert (result.returncode, ready.log()) == (0, [])
  assert result.stderr == (
    'Not tested with the newest jax: found no Python 3.13; name one: PYTHON=/path/to/python3.13\n'
  )
  (ready.bin / '3.13.0/bin').mkdir(parents=True)
  ready.add_python((3, 13, 0), '3.13.0/bin/python')
  if by_pyenv:
    (ready.bin / 'pyenv').write_text(
      f'#!{ready.bash}\n[[ "$1" == prefix ]] && echo "{ready.bin}/$2" || printf "3.12.1\\n3.13.0\\n"\n'
    )
    (ready.bin / 'pyenv').chmod(0o755)
  env = {} if by_pyenv else {'PYTHON': str(ready.bin / '3.13.0/bin/python')}
  assert ready.run('launch/test_newest.sh', 'a_test.py', **env).returncode == 0
  pinned = ready.repo / '.venv-newest/constraints.txt'
  *made, tested = ready.log()
  assert [line.split(' ')[0] for line in made] == ['venv', 'ensurepip', 'pip', 'pip']
  assert made[0].endswith(' .venv-newest') and tested == f'{PYTEST.replace("=10", "=5")} a_test.py'
  before, newest = ((REPO / name).read_text() for name in ('constraints.txt', 'constraints-newest.txt'))
  lines = pinned.read_text().splitlines()
  names = [line.partition('==')[0] for line in lines if '==' in line]
  assert len(names) == len(set(names)) == before.count('==')
  assert {line for line in newest.splitlines() if '==' in line} < set(lines) and 'optax==0.2.8' in lines


def test_accelerator(ready):
  assert ready.run('launch/quickstart.sh', ACCELERATOR='cuda').returncode == 0
  assert ready.log() == [INSTALL_RUN_TIME.replace('requirements', 'requirements-cuda'), QUICKSTART]
  assert_refused(
    ready.run('launch/quickstart.sh', ACCELERATOR='gpu'),
    'ACCELERATOR must be cuda or tpu; found no requirements-gpu.txt.',
  )


CHECKS = ['ruff check', 'ruff format', 'lint-imports', 'basedpyright', 'mkdocs build', PYTEST]


@pytest.mark.parametrize(
  ('broken', 'code', 'ran'),
  [
    (None, 0, CHECKS),
    ('ruff', 1, CHECKS[:1]),
    ('lint-imports', 1, CHECKS[:3]),
    ('basedpyright', 1, CHECKS[:4]),
    ('mkdocs', 1, CHECKS[:5]),
    ('pytest', 1, CHECKS),
  ],
)
def test_ci_stops_at_the_first_failure(ready, broken, code, ran):
  ready.run('launch/test.sh')
  for name in ('ruff', 'lint-imports', 'basedpyright', 'mkdocs'):
    tool = ready.repo / '.venv/bin' / name
    log = f'line="{name} $1"; echo "${{line% }}" >>"{ready.root}/log"'
    tool.write_text(f'#!{ready.bash}\n{log}\n[[ ! -e "{ready.root}/broken-{name}" ]]\n')
    tool.chmod(0o755)
  (ready.root / 'log').unlink()
  if broken:
    (ready.root / f'broken-{broken}').touch()
  before = set(ready.root.iterdir())
  assert ready.run('.ci/run').returncode == code
  assert [line for line in ready.log() if not line.startswith('pip install')] == ran
  assert set(ready.root.iterdir()) - before == {ready.root / 'log'}
