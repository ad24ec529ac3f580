"""The files that version 0.1.0 wrote, in fixtures/v0_1_0, load and give the same answers as with 0.1.0."""

import json
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
from running import run_main, saved_state, summary_of

import paranet_jax
from paranet_jax import devices
from paranet_jax.portable import run as bundle_runtime

pytestmark = pytest.mark.usefixtures('programs')

FIXTURES = Path(__file__).resolve().parent / 'fixtures/v0_1_0'
EXPECTED = json.loads((FIXTURES / 'expected.json').read_text())
IMAGES = np.load(FIXTURES / 'images.npy')


def assert_as_expected(predictions, name: str) -> None:
  expected = EXPECTED[name]
  for field in ('labels', 'exits', 'macs'):
    assert getattr(predictions, field).tolist() == expected[field], field
  np.testing.assert_allclose(predictions.probabilities, expected['probabilities'], atol=2e-5)


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
  return shutil.copytree(FIXTURES / 'run', tmp_path_factory.mktemp('v0_1_0') / 'run')


def test_a_packed_run():
  assert_as_expected(paranet_jax.EarlyExit.load(FIXTURES / 'packed').predict(IMAGES), 'packed')


def test_a_run_and_exits_files_of_every_policy_and_score(run_folder):
  early = paranet_jax.EarlyExit.load(run_folder)
  assert_as_expected(early.predict(IMAGES), 'run')
  for name in ('risk', 'patience', 'quota_entropy', 'timed_margin'):
    shutil.copy(FIXTURES / f'{name}_exits.json', run_folder / 'exits.json')
    assert_as_expected(early.with_plan(paranet_jax.load(run_folder).exits).predict(IMAGES), f'run by {name}_exits.json')


def test_a_bundle():
  assert_as_expected(bundle_runtime.load(FIXTURES / 'bundle').predict(IMAGES), 'bundle')


def test_evaluation_equals_the_saved_summary(run_folder):
  code, out, _ = run_main(f'--workdir={run_folder}', '--mode=eval', '--json')
  assert code == 0
  for found, saved in zip(json.loads(out)['splits']['test'], summary_of(FIXTURES / 'run')['exits'], strict=True):
    for measure in ('accuracy', 'top5', 'nll'):
      assert found[measure] == pytest.approx(saved[measure], rel=1e-4)


def test_a_stopped_run_resumes(tmp_path, monkeypatch):
  """With steps that learn nothing, which need not be compiled; tests/slow trains on."""
  workdir = shutil.copytree(FIXTURES / 'stopped', tmp_path / 'run')
  monkeypatch.setattr(
    devices, 'run_on', lambda *_: lambda state, totals, *_: (state.replace(step=state.step + 1), totals)
  )
  before = saved_state(workdir)
  code, out, err = run_main(f'--workdir={workdir}', '--config.train.max_steps=70', '--accept_config_changes')
  assert (code, err) == (0, '')
  assert 'checkpoint at step 47 of 70' in out
  assert before.step == 47
  chex.assert_trees_all_equal(saved_state(workdir), before.replace(step=np.int32(70)), strict=True)
  # A fresh network is right on a tenth.
  assert summary_of(workdir)['exits'][2]['accuracy'] > 0.5
