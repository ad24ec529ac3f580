"""`calibrate --dtype`: the network predicts in another type, with the same parameters."""

import json
import shutil

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from running import run_command

from paranet_jax.calibrate.__main__ import main
from paranet_jax.calibrate.flags import parse
from paranet_jax.early.exit_plan import EXITS
from paranet_jax.early.loaded_run import load
from paranet_jax.early.runtime import EarlyExit
from paranet_jax.export.__main__ import main as export
from paranet_jax.host.errors import UserError
from paranet_jax.models.multi_exit import Chain
from paranet_jax.models.staged import StagedModel
from paranet_jax.runs.dtype import has_dtype, in_dtype


@pytest.fixture(scope='module')
def workdir(finished_run, tmp_path_factory):
  return shutil.copytree(finished_run, tmp_path_factory.mktemp('dtype') / 'run')


def calibrated(workdir, *flags):
  """Calibrates; exits.json, and the run as it is then read."""
  result = run_command(main, f'--workdir={workdir}', '--threshold=0.9', *flags)
  assert (result.code, result.err) == (0, ''), result
  assert (', in bfloat16: ' in result.out) == bool(flags)
  return json.loads((workdir / EXITS).read_text()), load(workdir)


def test_the_network_predicts_in_it_and_with_the_same_parameters(workdir, tmp_path):
  whole, exact = calibrated(workdir)
  half, run = calibrated(workdir, '--dtype=bfloat16')
  assert (exact.model.dtype, run.model.dtype) == (jnp.float32, jnp.bfloat16)
  assert 'dtype' not in whole and half['dtype'] == 'bfloat16'
  assert half['fingerprint'] == whole['fingerprint']
  # Other logits, by little: what is fitted to them tells that calibration computed in bfloat16, too.
  assert half['temperatures'] != whole['temperatures']
  np.testing.assert_allclose(half['temperatures'], whole['temperatures'], rtol=0.05)
  images = np.random.default_rng(0).integers(0, 256, (64, *run.image_shape), np.uint8)
  answers = EarlyExit.load(workdir).predict(images).probabilities
  exactly = EarlyExit(exact.model, exact.variables, run.plan, run.image_shape, run.dataset.mean, run.dataset.std)
  in_full = exactly.predict(images).probabilities
  assert 0 < np.abs(answers - in_full).max() < 0.1

  out = tmp_path / 'bundle'
  result = run_command(export, f'--workdir={workdir}', f'--out={out}')
  assert result.code == 0, result
  assert 'dtype' not in json.loads((out / EXITS).read_text())
  assert 'with the network in JAX in bfloat16.' in (out / 'README.md').read_text()
  assert load(out).model.dtype == jnp.float32

  assert calibrated(workdir)[1].model.dtype == jnp.float32


def test_what_is_refused():
  message = '--dtype belongs to --workdir, found --bundle; leave one of them out'
  with pytest.raises(UserError, match=f'^{message}$'):
    parse(['--bundle=a', '--images=b', '--dtype=bfloat16'])
  with pytest.raises(UserError, match='argument --dtype: '):
    parse(['--workdir=a', '--threshold=0.9', '--dtype=int8'])

  class Fixed(Chain):
    """Its dtype is that of the base class."""

  staged = StagedModel([nn.Dense(2)], [1], 2, dtype=jnp.bfloat16)
  for model in (Fixed(), staged):
    assert in_dtype(model, None) is model
    message = (
      f'expected a network whose layers follow its field dtype for --dtype=bfloat16, found a {type(model).__name__}; '
      'leave it out'
    )
    with pytest.raises(UserError, match=f'^{message}$'):
      in_dtype(model, 'bfloat16')
  assert has_dtype(staged) and not has_dtype(Fixed()) and not has_dtype(object())
