"""Tests of the name language and of what each exit learns from, and when."""

import functools

import pytest

from paranet_jax.host.errors import UserError
from paranet_jax.targets import (
  GIVEN,
  LABELS,
  ModelName,
  Phase,
  check_regime,
  describe_target,
  distill_teachers,
  exits_targets,
  make_phases,
  matches_exits,
  parse_name,
  trained_exits,
)


@pytest.mark.parametrize(
  'name, num_pipelines, cascade, targets',
  [
    ('PN3-ddd', 3, True, (LABELS, LABELS, LABELS)),
    ('PN3cut-ddd', 3, False, (LABELS, LABELS, LABELS)),
    ('PN3-dxx', 3, True, (LABELS, None, None)),
    ('PN3-xdx', 3, True, (None, LABELS, None)),
    ('PN3-xxd', 3, True, (None, None, LABELS)),
    ('PN3-x3d', 3, True, (None, 3, LABELS)),
    ('PN3-33d', 3, True, (3, 3, LABELS)),
    ('PN3cut-33d', 3, False, (3, 3, LABELS)),
    ('PN3-23d', 3, True, (2, 3, LABELS)),
    ('PN3-xd2', 3, True, (None, LABELS, 2)),
    ('PN3-d1d', 3, True, (LABELS, 1, LABELS)),
    ('PN1-d', 1, True, (LABELS,)),
    ('PN1cut-d', 1, False, (LABELS,)),
    ('PN4-444d', 4, True, (4, 4, 4, LABELS)),
    ('PN9-23456789d', 9, True, (2, 3, 4, 5, 6, 7, 8, 9, LABELS)),
  ],
)
def test_names(name, num_pipelines, cascade, targets):
  assert parse_name(name) == ModelName(num_pipelines, cascade, targets)


@pytest.mark.parametrize(
  'name',
  [
    '',
    'PN3',
    'PN3cut',
    'ddd',
    '-ddd',
    'pn3-ddd',
    'PN-ddd',
    'PN0-',
    'PN0-d',
    'PN10-dddddddddd',
    'PN3Cut-ddd',
    ' PN3-ddd',
  ],
)
def test_other_forms_are_refused(name):
  with pytest.raises(UserError) as error:
    parse_name(name)
  assert str(error.value) == (
    f"name '{name}' does not have the form PN<P>[cut]-<suffix> with P from 1 to 9, such as PN3-ddd or PN3cut-33d; "
    'set --config.name'
  )


UNLABELLED = 'whose own exit no true label reaches'


@pytest.mark.parametrize(
  'name, message',
  [
    ('PN3-', "the suffix needs 3 characters, one per pipeline, and '' has 0; set --config.name"),
    ('PN3-dd', "the suffix needs 3 characters, one per pipeline, and 'dd' has 2"),
    ('PN3cut-dddd', "the suffix needs 3 characters, one per pipeline, and 'dddd' has 4"),
    ('PN3-ddd\n', r"the suffix needs 3 characters, one per pipeline, and 'ddd\n' has 4"),
    ('PN3-dd\n', r"'\n' at position 3 is none of d, x, 1 to 3"),
    ('PN3-dyd', "'y' at position 2 is none of d, x, 1 to 3; set --config.name"),
    ('PN3-Ddd', "'D' at position 1 is none of d, x, 1 to 3"),
    ('PN3-dd0', "'0' at position 3 is none of d, x, 1 to 3"),
    ('PN3-4dd', "'4' at position 1 is none of d, x, 1 to 3"),
    ('PN3-d٣d', "'٣' at position 2 is none of d, x, 1 to 3"),
    ('PN2-d-', "'-' at position 2 is none of d, x, 1 to 2"),
    ('PN3-1dd', "'1' at position 1 makes pipeline 1 match itself; give it 'd', 'x' or another pipeline"),
    ('PN3-dd3', "'3' at position 3 makes pipeline 3 match itself"),
    ('PN3-xxx', "every exit is 'x', so nothing would be trained; give one exit 'd'"),
    ('PN1-x', "every exit is 'x', so nothing would be trained"),
    ('PN3-23x', f"'2' at position 1 makes pipeline 1 match pipeline 2, {UNLABELLED}; give pipeline 2 a 'd' or another"),
    ('PN3-x32', f"'3' at position 2 makes pipeline 2 match pipeline 3, {UNLABELLED}; give pipeline 3 a 'd'"),
    ('PN3-2xd', f"'2' at position 1 makes pipeline 1 match pipeline 2, {UNLABELLED}"),
    ('PN3-d32', f"'3' at position 2 makes pipeline 2 match pipeline 3, {UNLABELLED}"),
    ('PN3-231', f"'2' at position 1 makes pipeline 1 match pipeline 2, {UNLABELLED}"),
    ('PN3-dx2', f"'2' at position 3 makes pipeline 3 match pipeline 2, {UNLABELLED}"),
  ],
)
def test_suffixes_are_refused(name, message):
  with pytest.raises(UserError) as error:
    parse_name(name)
  text = str(error.value)
  assert text.startswith(f'name {name!r}: {message}')
  assert text.splitlines() == [text]


@pytest.mark.parametrize(
  'targets, expected', [((None, 3, LABELS), True), ((LABELS, None), False), ((LABELS, GIVEN), False)]
)
def test_matches_exits(targets, expected):
  assert matches_exits(targets) is expected


def test_trained_exits():
  assert trained_exits((None, LABELS, 2)) == (2, 3)


def test_describe_target():
  assert [describe_target(target) for target in (LABELS, 3, None, GIVEN)] == [
    *('labels', 'exit 3', 'nothing', 'given'),
  ]
  assert [describe_target(LABELS, teachers, 0.0) for teachers in ((3,), (2, 3))] == ['exit 3', 'exits 2 3']
  assert describe_target(LABELS, (2, 3), 0.5) == 'labels, exits 2 3'
  assert describe_target(3, (), 0.5) == 'labels, exit 3'


@pytest.mark.parametrize(
  ('suffix', 'distill', 'teachers'),
  [
    ('ddd', 'none', {}),
    ('dxx', 'none', {}),
    ('dddd', 'last', {1: (4,), 2: (4,), 3: (4,)}),
    ('dddd', 'next', {1: (2,), 2: (3,), 3: (4,)}),
    ('dddd', 'later', {1: (2, 3, 4), 2: (3, 4), 3: (4,)}),
    # Untrained exits teach no exit, and matched exits keep their own teacher.
    ('xdxdx', 'last', {2: (4,)}),
    ('d4xd', 'next', {1: (2,)}),
    ('d4xd', 'later', {1: (2, 4)}),
  ],
)
def test_distill_teachers(suffix, distill, teachers):
  targets = parse_name(f'PN{len(suffix)}-{suffix}').targets
  assert distill_teachers(targets, distill, 0.0, 'NET') == teachers


NO_TEACHER = 'needs an exit that learns from labels and a trained exit after it, and NET has none; '
NO_LABEL = (
  'of NET would learn from no label, directly or through its teachers; raise --config.loss.hard_label_weight, or '
)


@pytest.mark.parametrize(
  ('suffix', 'distill', 'message'),
  [
    ('xdx', 'last', f"loss.distill 'last' {NO_TEACHER}set --config.loss.distill"),
    ('3xd', 'next', f"loss.distill 'next' {NO_TEACHER}set --config.loss.distill"),
    ('d1', 'next', f"loss.distill 'next': exit 1 {NO_LABEL}set --config.loss.distill"),
    ('dd1', 'last', f"loss.distill 'last': exit 1 {NO_LABEL}set --config.loss.distill"),
    ('d1d', 'next', f"loss.distill 'next': exit 1 {NO_LABEL}set --config.loss.distill"),
  ],
)
def test_exits_that_cannot_be_distilled(suffix, distill, message):
  targets = parse_name(f'PN{len(suffix)}-{suffix}').targets
  with pytest.raises(UserError) as error:
    distill_teachers(targets, distill, 0.0, 'NET')
  assert str(error.value) == message
  if 'no label' in message:
    assert distill_teachers(targets, distill, 0.1, 'NET')
  else:
    with pytest.raises(UserError):
      distill_teachers(targets, distill, 0.1, 'NET')


@pytest.mark.parametrize(
  ('regime', 'targets', 'phases'),
  [
    ('joint', (3, None, 0), (((3, None, 0), 10, None),)),
    ('mixed', (0, None, 0, None), (((None, None, 0, None), 4, None), ((0, None, 0, None), 10, None))),
    ('disjoint', (0, 3, 0), (((None, None, 0), 4, None), ((0, 3, None), 10, 3))),
    ('exits', (3, 3, GIVEN), (((3, 3, None), 10, 3),)),
    ('exits', (3, 3, 0), (((3, 3, 0), 10, None),)),
  ],
)
def test_make_phases(regime, targets, phases):
  expected = tuple(Phase(end, own, frozen) for own, end, frozen in phases)
  assert make_phases(regime, targets, backbone_steps=4, total_steps=10) == expected


@pytest.mark.parametrize(
  ('targets', 'message'),
  [
    (
      (None, 0, None),
      "train.regime 'mixed' trains the last exit first and then others, and NET trains exit 2 alone; "
      'set --config.train.regime',
    ),
    (
      (0, 1, None),
      "train.regime 'mixed' trains the last exit alone first, from labels, and exit 2 of NET learns from exit 1; "
      'set --config.train.regime',
    ),
  ],
)
def test_regimes_with_two_phases_need_a_last_exit_trained_from_labels(targets, message):
  with pytest.raises(UserError) as error:
    check_regime('mixed', targets, 'NET')
  assert str(error.value) == message
  check_regime('joint', targets, 'NET')


def test_the_targets_of_exits_on_a_frozen_backbone():
  targets = {learn_from: exits_targets(3, learn_from) for learn_from in ('last', 'labels', 'both')}
  assert targets == {'last': (3, 3, GIVEN), 'labels': (0, 0, GIVEN), 'both': (0, 0, GIVEN)}
  assert distill_teachers(targets['both'], 'last', 0.5, 'NET') == {1: (3,), 2: (3,)}
  assert distill_teachers(targets['both'], 'last', 0.0, 'NET') == {1: (3,), 2: (3,)}
  assert exits_targets(3, 'last', new_last=True) == (3, 3, 0)
  check_regime('exits', targets['last'], 'NET')
  check_regime('exits', (0,), 'NET')
  with pytest.raises(UserError) as error:
    check_regime('exits', exits_targets(1, 'last'), 'NET')
  assert str(error.value) == (
    "train.regime 'exits' trains the exits before the last one, and NET has none; set --config.model.exits, or "
    '--config.train.regime'
  )


def test_every_exit_learns_from_another_network():
  assert distill_teachers((LABELS, None, LABELS, 3), 'all', 0.5, 'NET') == {1: (4,), 3: (4,)}
  assert distill_teachers((LABELS, LABELS), 'all', 0.0, 'NET', given=True) == {1: (2,), 2: (2,)}
  with pytest.raises(UserError, match="loss.distill 'all': exit 1 of NET would learn from no label"):
    distill_teachers((LABELS, LABELS), 'all', 0.0, 'NET')


def test_matching_from_a_step_on():
  joint = functools.partial(make_phases, 'joint', (2, LABELS, None), 4, 10, match_step=3)
  assert joint() == (Phase(3, (LABELS, LABELS, None)), Phase(10, (2, LABELS, None)))
  assert joint(match_before='nothing') == (Phase(3, (None, LABELS, None)), Phase(10, (2, LABELS, None)))
