"""A run that version 0.1.0 began is trained to a later end."""

import shutil
from pathlib import Path

from running import run_main, summary_of

STOPPED = Path(__file__).resolve().parents[1] / 'fixtures/v0_1_0/stopped'


def test_a_stopped_run_resumes(tmp_path):
  workdir = shutil.copytree(STOPPED, tmp_path / 'run')
  code, out, err = run_main(f'--workdir={workdir}', '--config.train.max_steps=70', '--accept_config_changes')
  assert (code, err) == (0, '')
  assert 'checkpoint at step 47 of 70' in out
  # 23 steps from fresh parameters reach less than half of this.
  assert summary_of(workdir)['exits'][2]['accuracy'] > 0.7
