"""A run with a worker process that reads its images; ../stream_train_test.py reads them in threads."""

import multiprocessing
import os
import signal

import chex
import pytest
from running import TINY, before_each_step, run_main, saved_state

pytestmark = pytest.mark.usefixtures('programs')

RUN = (*TINY, '--config.name=PN1-d')
STREAMED = ('--config.data.streaming=True', '--config.data.workers=0')


def trained(workdir, *arguments):
  result = run_main(*RUN, f'--workdir={workdir}', *arguments)
  assert (result.code, result.err) == (0, '')
  return workdir


@pytest.fixture(scope='module')
def streamed(programs, tmp_path_factory):
  return trained(tmp_path_factory.mktemp('streamed'), *STREAMED)


def test_a_signal_to_the_group_leaves_the_workers_to_the_run(tmp_path, streamed):
  worker = (*STREAMED, '--config.data.workers=1', '--config.eval.every_epochs=9')

  def act(step, _):
    if step == 1:  # The run continues, as when several processes agree on a later step.
      (process,) = multiprocessing.active_children()
      process.terminate()
      process.join(0.5)
      assert process.is_alive()
    if step == 8:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.MonkeyPatch.context() as patch:
    before_each_step(patch, act)
    result = run_main(*RUN, f'--workdir={tmp_path}', *worker)
  assert (result.code, result.err) == (0, '')
  assert result.out.splitlines()[-1] == 'stopped by SIGTERM after step 9, saved; the same command resumes'
  assert multiprocessing.active_children() == []
  trained(tmp_path, *STREAMED, '--accept_config_changes')  # How many workers read the images does not matter.
  chex.assert_trees_all_equal(saved_state(tmp_path), saved_state(streamed), strict=True)
