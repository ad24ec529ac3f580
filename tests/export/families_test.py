"""Small networks of every family: a bundle gives the logits, exits and labels of the JAX runtime."""

import dataclasses
import json

import numpy as np
import pytest
from exportable import COUNT, IMAGES, MODELS, SIDE, early_exit, made

from paranet_jax.early.exit_plan import with_thresholds
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.export import bundle as bundle_lib
from paranet_jax.export.compare import all_logits
from paranet_jax.portable import run as runtime


def test_exits_that_are_skipped(tmp_path):
  """If no image exits at 2, `predict` runs from 1 to 3 in one stage, and `anytime` runs all three."""
  run, plan, logits = made(MODELS['paranet']())
  macs = mac_costs(run.model, (SIDE, SIDE, 3), plan.exits)
  plan = with_thresholds(plan, np.array([plan.confidence_thresholds[0], np.inf, -np.inf]), macs)
  bundle_lib.write_bundle(bundle_lib.Request(tmp_path, tmp_path / 'out', ('onnx',), 'float32'), run, plan, IMAGES)
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


@pytest.mark.parametrize('name', MODELS)
def test_the_bundle_answers_as_the_jax_runtime(name, tmp_path, monkeypatch):
  model = MODELS[name]()
  run, plan, logits = made(model)
  run = dataclasses.replace(run, model=model)
  monkeypatch.setattr(bundle_lib, 'compare', lambda *_: {'images': COUNT, 'labels': 1, 'exits': 1, 'logits': 0})
  for name in ('exit_costs', 'model_card'):  # Only the card needs the costs.
    monkeypatch.setattr(bundle_lib, name, lambda *_: '')
  bundle_lib.write_bundle(bundle_lib.Request(tmp_path, tmp_path / 'out', ('onnx',), 'float32'), run, plan, IMAGES)
  bundle = runtime.load(tmp_path / 'out', threads=1)
  np.testing.assert_allclose(all_logits(bundle, IMAGES), logits, rtol=1e-4, atol=1e-4 * max(np.abs(logits).max(), 1))
  early = early_exit(run, plan)
  ours, theirs = early.predict(IMAGES), bundle.predict(IMAGES)
  for field in ('labels', 'exits', 'macs'):
    np.testing.assert_array_equal(getattr(theirs, field), getattr(ours, field))
  np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-4)
  assert len(set(ours.exits)) == len(plan.exits)
  anytime = list(bundle.anytime(IMAGES[0]))
  assert [answer.macs for answer in anytime] == json.loads((tmp_path / 'out/bundle.json').read_text())['all_macs']
  np.testing.assert_array_equal([answer.label for answer in anytime], logits[:, 0].argmax(-1))
