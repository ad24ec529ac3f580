"""Small networks of every family: a bundle gives the logits, exits and labels of the JAX runtime."""

import json

import numpy as np
import pytest
from exportable import (
  COUNT,
  IMAGES,
  QUICK,
  SIDE,
  assert_bundle_answers_as_the_jax_runtime,
  early_exit,
  paranet,
  write_paranet,
)

from paranet_jax.early.exit_plan import with_thresholds
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.portable import run as runtime


def test_exits_that_are_skipped(tmp_path):
  """If no image exits at 2, `predict` runs from 1 to 3 in one stage, and `anytime` runs all three."""
  run, plan, logits = paranet()
  macs = mac_costs(run.model, (SIDE, SIDE, 3), plan.exits)
  plan = with_thresholds(plan, np.array([plan.confidence_thresholds[0], np.inf, -np.inf]), macs)
  write_paranet(tmp_path / 'out', plan)
  described = json.loads((tmp_path / 'out/bundle.json').read_text())
  assert described['visited_stages'] == ['stage_1', 'stage_3_after_1']
  assert described['all_stages'] == ['stage_1', 'stage_2', 'stage_3']
  assert described['agreement'] == {'images': COUNT, 'of': 'noise', **described['agreement'], 'labels': 1, 'exits': 1}
  bundle, ours = runtime.load(tmp_path / 'out'), early_exit(run, plan).predict(IMAGES)
  theirs = bundle.predict(IMAGES)
  assert set(ours.exits) == {1, 3}
  for field in ('labels', 'exits', 'macs'):
    np.testing.assert_array_equal(getattr(theirs, field), getattr(ours, field))
  np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-4)
  np.testing.assert_array_equal([answer.label for answer in bundle.anytime(IMAGES[0])], logits[:, 0].argmax(-1))


# At least one of each family; tests/slow has more.
@pytest.mark.parametrize('name', QUICK)
def test_the_bundle_answers_as_the_jax_runtime(name, tmp_path):
  assert_bundle_answers_as_the_jax_runtime(name, tmp_path)
