"""exits.json: what is written is read, and wrong contents are rejected in one line."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny

from paranet_jax.early.exit_plan import (
  EXITS,
  CheckpointId,
  fingerprint,
  full_network_plan,
  load_plan,
  read_plan,
  save_plan,
)
from paranet_jax.host.errors import UserError
from paranet_jax.portable.run import PROMISES

OPTIONAL = {*PROMISES, 'joules', 'audit', 'dtype'}

CHECKPOINT = CheckpointId('PN3-ddd', 'digits', 420, '0123456789abcdef')
FULL = full_network_plan(CHECKPOINT, (1, 2, 3), (10, 20, 30))
PLAN = dataclasses.replace(
  FULL,
  policy='optimal',
  target={'budget': 15.0, 'unit': 'macs'},
  temperatures=(1.5, 0.75, 2.0),
  thresholds=(0.9, None, 0.0),
  confidence_thresholds=(2.302585092994046, None, 0.0),
  visited=(1, 3),
  macs=(10, None, 35),
  ms=(0.1, None, 0.3),
  expected={'accuracy': 0.75},
)


ABOVE_0 = 'must be a number above 0 for each exit'
COSTS = 'must be a number of 0 or more, or null, for each exit'
RESULTS = 'must be an object with accuracy (or agreement) and cost_macs, and numbers for each exit or null'
VISITED = 'must be the exits that have macs, those with a threshold among them'
AGREE = 'must be confidence_thresholds on the scale of the score'


REJECT = {'risk': 0.02, 'delta': 0.1, 'confidence_threshold': None, 'threshold': None}
SETS = {'coverage': 0.9, 'penalty': 0.01, 'free': 5, 'limits': [0.5, None, 0.25], 'anytime': 0.75}

AUDIT = {
  'images': 9,
  'within': 8,
  'most_macs': 35.0,
  'corruptions': [{'name': 'blur', 'cost_macs': 20.0}],
  'clean': {'cost_macs': 15.0},
  'hardest': {'name': 'blur', 'cost_macs': 20.0},
  'attack': {'cost_macs': 30.0},
}
AUDITED = 'must be an object with images, within and most_macs, and costs of clean, hardest and attack or null'
SEEN = {'images': 3, 'edges': [[0.5], [], []], 'counts': [[1, 1], [0], [1]], 'classes': [2, 1], 'wrong': 1}


def command(workdir):
  return f'python -m paranet_jax.calibrate --workdir={workdir} --threshold=0.9'


def edited(workdir, **changes):
  """Writes the plan with changes to its fields; ...: without the field."""
  save_plan(workdir, PLAN)
  saved = json.loads((workdir / EXITS).read_text()) | changes
  (workdir / EXITS).write_text(json.dumps({name: value for name, value in saved.items() if value is not ...}))


WITHOUT_LABELS = {'accuracy': None, 'agreement': 0.75, 'exit_agreement': [0.5, 0.75, 1.0], 'cost_macs': 20.0}


@pytest.mark.parametrize(
  'plan',
  [
    PLAN,
    FULL,
    full_network_plan(CHECKPOINT, (2,), (20,)),
    dataclasses.replace(PLAN, test=WITHOUT_LABELS),
    dataclasses.replace(PLAN, reject=REJECT, sets=SETS, seen=SEEN),
    dataclasses.replace(PLAN, joules=(0.5, None, 1.5), audit=AUDIT),
    dataclasses.replace(PLAN, dtype='bfloat16'),
  ],
)
def test_what_is_saved_is_loaded(tmp_path, plan):
  save_plan(tmp_path, plan)
  assert load_plan(tmp_path, CHECKPOINT, plan.exits) == plan
  assert [path.name for path in tmp_path.iterdir()] == ['exits.json']
  assert json.loads((tmp_path / EXITS).read_text())['schema_version'] == 1


def test_the_full_network_runs_its_last_exit_alone():
  assert FULL.confidence_thresholds == FULL.thresholds == (None, None, 0.0)
  assert FULL.visited == (3,) and FULL.macs == (None, None, 30) and FULL.policy == 'full'


def test_the_most_that_an_image_costs():
  assert (FULL.most_macs, PLAN.most_macs) == (30, 35)
  capped = dataclasses.replace(PLAN, confidence_thresholds=(0.5, 0.0, 0.0), macs=(10, 20, 35))  # As by --max-macs.
  assert capped.most_macs == 20
  assert dataclasses.replace(PLAN, confidence_thresholds=(None, 0.5, 0.0)).confidence_floors.tolist() == [
    math.inf,
    0.5,
    -math.inf,
  ]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'schema_version': 2}, ' must have schema_version 1, found 2'),
    ({'schema_version': None}, ' must have schema_version 1, found None'),
    ({'name': 3}, ': name must be text, found 3'),
    ({'step': True}, ': step must be an integer, found true'),
    ({'score': 'prob'}, ': score must be one of max_prob, entropy, margin, patience, found "prob"'),
    ({'policy': None}, ': policy must be text, found null'),
    ({'target': []}, ': target must be an object, found []'),
    ({'splits': 1}, ': splits must be an object or null, found 1'),
    ({'test': 1}, f': test {RESULTS}, found 1'),
    ({'test': {'accuracy': 0.5}}, f': test {RESULTS}, found {{"accuracy": 0.5}}'),
    ({'test': {'agreement': '1', 'cost_macs': 1}}, f': test {RESULTS}, found {{"agreement": "1", "cost_macs": 1}}'),
    (
      {'test': {'accuracy': 1, 'cost_macs': 1, 'shares': [1]}},
      f': test {RESULTS}, found {{"accuracy": 1, "cost_macs": 1, "shares": [1]}}',
    ),
    ({'exits': [2, 1, 3]}, ': exits must be increasing exit numbers, found [2, 1, 3]'),
    ({'exits': []}, ': exits must be increasing exit numbers, found []'),
    ({'exits': [0, 1, 2]}, ': exits must be increasing exit numbers, found [0, 1, 2]'),
    ({'temperatures': [1.0, 0.0, 1.0]}, f': temperatures {ABOVE_0}, found [1.0, 0.0, 1.0]'),
    ({'temperatures': [1.0]}, f': temperatures {ABOVE_0}, found [1.0]'),
    ({'temperatures': [10**400] * 3}, f': temperatures {ABOVE_0}, found [1' + 55 * '0' + '...'),
    ({'thresholds': [0.9, None, 0.5]}, f': thresholds {COSTS}, the last 0, found [0.9, null, 0.5]'),
    (
      {'confidence_thresholds': [float('nan'), None, 0.0]},
      f': confidence_thresholds {COSTS}, the last 0, found [NaN, null, 0.0]',
    ),
    ({'macs': [-1, None, 35]}, f': macs {COSTS}, found [-1, null, 35]'),
    ({'macs': [2**63, None, 2**63]}, f': macs {COSTS}, found [9223372036854775808, null, 9223372036854775808]'),
    ({'ms': 'fast'}, f': ms {COSTS} or null, found "fast"'),
    ({'macs_alone': [1.5, 2, 3]}, ': macs_alone must be an integer above 0 for each exit, found [1.5, 2, 3]'),
    ({'reject': 0.1}, f': reject must be {PROMISES["reject"][1]}, found 0.1'),
    ({'sets': {}}, f': sets must be {PROMISES["sets"][1]}, found {{}}'),
    ({'seen': {'images': 3}}, f': seen must be {PROMISES["seen"][1]}, found {{"images": 3}}'),
    ({'joules': [0.5]}, f': joules {COSTS} or null, found [0.5]'),
    ({'dtype': 'int8'}, ': dtype must be one of float32, bfloat16, found "int8"'),
    ({'audit': {}}, f': audit {AUDITED}, found {{}}'),
    ({'audit': {'clean': 1}}, f': audit {AUDITED}, found {{"clean": 1}}'),
    (
      {'audit': {'images': 1, 'within': 1, 'most_macs': 1, 'clean': {}}},
      f': audit {AUDITED}, found {{"images": 1, "within": 1, "most_macs": 1, "clean": {{}}}}',
    ),
    ({'visited': [3]}, f': visited {VISITED}, found [3]'),
    ({'visited': [1, 2, 3]}, f': visited {VISITED}, found [1, 2, 3]'),
    # Prediction reads only confidence_thresholds, so it would not see the difference.
    ({'thresholds': [0.8, None, 0.0]}, f': thresholds {AGREE}, found [0.8, null, 0.0]'),
    ({'thresholds': [None, None, 0.0]}, f': thresholds {AGREE}, found [null, null, 0.0]'),
  ],
)
def test_a_field_with_a_wrong_value(tmp_path, changes, message):
  edited(tmp_path, **changes)
  with pytest.raises(UserError) as error:
    read_plan(tmp_path)
  assert str(error.value) == f'{tmp_path / EXITS}{message}; {command(tmp_path)} writes it again'


def test_promises_that_are_not_made_are_not_saved(tmp_path):
  save_plan(tmp_path, PLAN)
  assert not OPTIONAL & set(json.loads((tmp_path / EXITS).read_text()))


@pytest.mark.parametrize('field', [field.name for field in dataclasses.fields(PLAN) if field.name not in OPTIONAL])
def test_a_missing_field(tmp_path, field):
  edited(tmp_path, **{field: ...})
  with pytest.raises(UserError, match=f'exits.json lacks the field {field}; python -m paranet_jax.calibrate'):
    read_plan(tmp_path)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, 'expected {path}, found none; {fix} writes it'),
    (b'{"name": ', '{path} is not a JSON object (Expecting value'),
    (b'[1, 2]', '{path} is not a JSON object (it holds [1, 2]); {fix} writes it again'),
  ],
)
def test_no_file_or_a_damaged_one(tmp_path, content, message):
  path = tmp_path / EXITS
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError) as error:
    read_plan(tmp_path)
  assert str(error.value).startswith(message.format(path=path, fix=command(tmp_path)))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('here', 'exits', 'message'),
  [
    ({'name': 'PN3-33d'}, (1, 2, 3), ' belongs to another checkpoint: name PN3-ddd there, PN3-33d here; {fix}'),
    ({'dataset': 'cifar100'}, (1, 2, 3), ' belongs to another checkpoint: dataset digits there, cifar100 here; {fix}'),
    (
      {'step': 400},
      (1, 2, 3),
      ' belongs to another checkpoint: step 420 there, 400 here; {fix}, or set --step=420',
    ),
    (
      {'fingerprint': 'f' * 16},
      (1, 2, 3),
      ' belongs to another checkpoint: variables 0123456789abcdef there, ffffffffffffffff here; {fix}',
    ),
    ({}, (2, 3), ': exits must be the exits that were trained, [2, 3], found [1, 2, 3]; {fix}'),
  ],
)
def test_a_plan_for_another_run(tmp_path, here, exits, message):
  save_plan(tmp_path, PLAN)
  with pytest.raises(UserError) as error:
    load_plan(tmp_path, CHECKPOINT._replace(**here), exits)
  assert str(error.value) == f'{tmp_path / EXITS}' + message.format(fix=f'{command(tmp_path)} writes it again')


def test_the_command_is_quoted():
  with pytest.raises(UserError, match=r"calibrate --workdir='/no such/run' --threshold"):
    read_plan(Path('/no such/run'))


def test_a_fingerprint_changes_with_any_value():
  variables = tiny.variables(tiny.named('PN1-d'))
  before = fingerprint(variables)
  assert fingerprint(tiny.variables(tiny.named('PN1-d'))) == before and len(before) == 16
  assert fingerprint({**variables, 'opt_state': 1}) == before
  for collection in ('params', 'batch_stats'):
    changed = tiny.variables(tiny.named('PN1-d'))
    leaf = changed[collection]
    while isinstance(leaf, dict):
      leaf = leaf[max(leaf)]
    leaf.ravel()[-1:] = np.nextafter(leaf.ravel()[-1], np.inf, dtype=leaf.dtype)
    assert fingerprint(changed) != before
