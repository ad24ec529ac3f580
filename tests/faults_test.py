"""Faults while a run writes its files: after each, the same command resumes and ends where it would have ended.

A process is really killed once, at the costliest moment; for the other moments, what a kill would leave is copied.
"""

import shutil

import chex
import pytest
from killing import copied_at, fault_here, names, run
from running import TINY, run_main, saved_state, summary_of

from paranet_jax.display.metrics import read_metrics

pytestmark = pytest.mark.usefixtures('programs')

# Checkpoints are of steps 2, 4, 6, 8 and 10, of which the last two are kept.
RUN = (*TINY, '--config.name=PN1-d', '--config.checkpoint.every_steps=2')

# Events, see killing.py.
MOMENTS = {
  'the first file is written': ('os.rename .*/config.json ', 1),
  'a checkpoint is written': (r'open .*/2\.orbax-checkpoint-tmp/state.*/_METADATA w', 1),
  'a checkpoint is saved and what is old is not yet deleted': ('os.rename .*/deleted/', 1),
  'an old checkpoint is deleted': ('shutil.rmtree .*/deleted', 4),
  'the last checkpoint is written': (r'open .*/10\.orbax-checkpoint-tmp/state.*/_METADATA w', 1),
  'summary.json is written': ('os.rename .*/summary.json ', 1),
}


@pytest.fixture(scope='module')
def folder(programs, tmp_path_factory):
  """Folder of a run to which nothing happened, `whole`, and of what a kill would have left at each moment."""
  folder = tmp_path_factory.mktemp('faults')
  with copied_at(folder / 'whole', MOMENTS, folder):
    assert run_main(*RUN, f'--workdir={folder}/whole')[::2] == (0, '')
  return folder


@pytest.fixture(scope='module')
def whole(folder):
  return folder / 'whole'


def assert_ends_as(workdir, whole):
  """Lets the run finish."""
  result = run_main(*RUN, f'--workdir={workdir}')
  assert (result.code, result.err) == (0, '')
  chex.assert_trees_all_equal(saved_state(workdir), saved_state(whole), strict=True)
  found, expected = ([line for line in read_metrics(run) if line['split'] != 'train'] for run in (workdir, whole))
  assert found == expected and len(found) == 4
  assert summary_of(workdir) == summary_of(whole)
  assert names(workdir) == names(whole)
  return result.out


@pytest.mark.parametrize('moment', MOMENTS)
def test_left_by_a_kill_while(moment, folder, whole):
  workdir = folder / moment
  left = names(workdir)
  assert left and left != names(whole) and not (workdir / 'summary.json').exists()
  assert_ends_as(workdir, whole)


def test_killed(tmp_path, whole):
  """Another process, with other threads, sums in another order."""
  event = r'open .*/4\.orbax-checkpoint-tmp/state.*/_METADATA w'
  code, out, _ = run(*RUN, workdir=tmp_path, fault=('kill', event, 1))
  assert code == -9 and 'resuming' not in out
  assert 'resuming from the checkpoint at step 2 of 10' in run_main(*RUN, f'--workdir={tmp_path}').out.splitlines()
  chex.assert_trees_all_close(saved_state(tmp_path), saved_state(whole), rtol=1e-4, atol=1e-5)
  assert names(tmp_path) == names(whole)


def test_a_checkpoint_that_is_cut_off(tmp_path, whole):
  workdir = shutil.copytree(whole, tmp_path / 'copy')
  (workdir / 'summary.json').unlink()
  folder = workdir / 'checkpoints' / '10'
  for values in folder.rglob('d/*'):
    values.write_bytes(values.read_bytes()[:-1])
  out = run_main(*RUN, f'--workdir={workdir}').out
  named, resumed = (line for line in out.splitlines() if line.startswith(('checkpoint', 'resuming')))
  assert named.startswith(f'checkpoint {folder} is damaged (')
  assert named.endswith(f'); moved to {workdir}/damaged_checkpoints/10')
  assert resumed == 'resuming from the checkpoint at step 8 of 10'
  shutil.rmtree(workdir / 'damaged_checkpoints')
  assert_ends_as(workdir, whole)


# Files that cannot be flushed are not closed, which does not matter to a process that ends.
@pytest.mark.filterwarnings('ignore::ResourceWarning', 'ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_full_disk(tmp_path, whole):
  # Nothing but checkpoints is written on the way, so that they are what there is no room for.
  silent = *RUN, '--config.log.every_steps=1000', '--config.eval.every_epochs=1000', f'--workdir={tmp_path}'
  with fault_here('full', r'os.mkdir .*/4\.orbax-checkpoint-tmp ', 1):
    code, _, err = run_main(*silent)
  assert (code, err) == (
    2,
    f'error: the checkpoint of step 4 cannot be written to {tmp_path}/checkpoints (File too large), '
    'and the one of step 2 is intact; fix that or make room, and the same command resumes\n',
  )
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['2']
  with fault_here('full', 'open .*/events.out', 1):
    code, _, err = run_main(*silent)
  assert (code, err) == (
    2,
    f'error: {tmp_path} cannot be written (File too large), and its checkpoints are intact; '
    'make room, and the same command resumes\n',
  )
  with fault_here('full', r'open .*/config\.json\.\w+\.tmp', 1):
    code, _, err = run_main(*silent)
  assert code == 2 and err.startswith(f'error: {tmp_path} cannot be written (File too large)')
  assert not list(tmp_path.glob('*.tmp'))
  assert run_main(*silent)[::2] == (0, '')
  chex.assert_trees_all_equal(saved_state(tmp_path), saved_state(whole), strict=True)
