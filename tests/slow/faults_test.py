"""As ../faults_test.py, with the program in processes that really die."""

import shutil

import chex
import pytest
from killing import RUN, assert_ends_as, run
from running import saved_state


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The folder of a run to which nothing happened."""
  workdir = tmp_path_factory.mktemp('whole')
  assert run(*RUN, workdir=workdir)[::2] == (0, '')
  return workdir


KILLED_WHILE = {
  'the first file is written': ('os.rename .*/config.json ', 1),
  'a checkpoint is written': (r'open .*/12\.orbax-checkpoint-tmp/state.*/_METADATA w', 1),
  'a checkpoint is saved and its step not yet followed by a log line': ('shutil.rmtree .*/deleted', 2),
  'a log line is written and its step not yet saved': (r'os.mkdir .*/24\.orbax-checkpoint-tmp ', 1),
  'an old checkpoint is deleted': ('os.rename .*/deleted/', 1),
  'summary.json is written': ('os.rename .*/summary.json ', 1),
}


def test_killed_again_and_again(tmp_path, whole):
  for name, event in KILLED_WHILE.items():
    code, *_ = run(*RUN, workdir=tmp_path, fault=('kill', *event))
    assert code == -9, f'not killed while {name}'
    assert not (tmp_path / 'summary.json').exists()
  assert run(*RUN, workdir=tmp_path)[::2] == (0, '')
  assert_ends_as(tmp_path, whole)


def test_a_checkpoint_that_is_cut_off(tmp_path, whole):
  workdir = tmp_path / 'copy'
  shutil.copytree(whole, workdir)
  (workdir / 'summary.json').unlink()
  folder = workdir / 'checkpoints' / '66'
  for values in folder.rglob('d/*'):
    values.write_bytes(values.read_bytes()[:-1])
  code, out, err = run(*RUN, workdir=workdir)
  assert (code, err) == (0, '')
  named, resumed = (line for line in out.splitlines() if line.startswith(('checkpoint', 'resuming')))
  assert named.startswith(f'checkpoint {folder} is damaged (')
  assert named.endswith(f'); moved to {workdir}/damaged_checkpoints/66')
  assert resumed == 'resuming from the checkpoint at step 60 of 66'
  shutil.rmtree(workdir / 'damaged_checkpoints')
  assert_ends_as(workdir, whole)


def test_a_full_disk(tmp_path, whole):
  # Nothing but checkpoints is written on the way, so that they are what there is no room for.
  silent = *RUN, '--config.log.every_steps=1000', '--config.eval.every_epochs=1000'
  code, _, err = run(*silent, workdir=tmp_path, fault=('full', r'os.mkdir .*/24\.orbax-checkpoint-tmp ', 1))
  assert (code, err) == (
    2,
    f'error: the checkpoint of step 24 cannot be written to {tmp_path}/checkpoints (File too large), '
    'and the one of step 12 is intact; fix that or make room, and the same command resumes\n',
  )
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['12']
  code, _, err = run(*silent, workdir=tmp_path, fault=('full', 'open .*/events.out', 1))
  assert (code, err) == (
    2,
    f'error: {tmp_path} cannot be written (File too large), and its checkpoints are intact; '
    'make room, and the same command resumes\n',
  )
  code, _, err = run(*silent, workdir=tmp_path, fault=('full', r'open .*/config\.json\.\w+\.tmp', 1))
  assert code == 2 and err.startswith(f'error: {tmp_path} cannot be written (File too large)')
  assert not list(tmp_path.glob('*.tmp'))
  assert run(*silent, workdir=tmp_path)[::2] == (0, '')
  chex.assert_trees_all_equal(saved_state(tmp_path), saved_state(whole), strict=True)
