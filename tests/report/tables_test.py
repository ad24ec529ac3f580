"""Tests of the tables on the terminal."""

import pytest

from paranet_jax.report.tables import describe_table, evaluation_table, human_count


def exit_cost(number, trained, learns_from, own_params, params, own_macs, macs, macs_alone) -> dict:
  return {
    'exit': number,
    'trained': trained,
    'learns_from': learns_from,
    'own_params': own_params,
    'params': params,
    'own_macs': own_macs,
    'macs': macs,
    'macs_alone': macs_alone,
  }


def test_describe_table():
  description = {
    'name': 'PN3cut-x3d',
    'dataset': 'cifar100',
    'seed': 0,
    'exits': [
      exit_cost(1, False, 'labels', 198_460, 198_460, 3_413_088, 3_413_088, 3_413_088),
      exit_cost(2, True, 'exit 3', 594_412, 792_872, 17_449_824, 20_862_912, 17_449_824),
      exit_cost(3, True, 'labels', 1_264_156, 2_057_028, 77_815_392, 98_678_304, 77_815_392),
    ],
  }
  assert describe_table(description).splitlines() == [
    'PN3cut-x3d on cifar100: 2.06 M parameters, 98.68 M multiply-adds an image',
    'exit  learns from  own params     params    own macs        macs  macs alone',
    '   1  —               198,460    198,460   3,413,088   3,413,088   3,413,088',
    '   2  exit 3          594,412    792,872  17,449,824  20,862,912  17,449,824',
    '   3  labels        1,264,156  2,057,028  77,815,392  98,678,304  77,815,392',
    'macs: multiply-adds an image; own: added by this stage; alone: needed by this exit alone.',
  ]


def test_the_table_of_a_large_model_fits_100_columns():
  description = {
    'name': 'PN12-ddd',
    'dataset': 'imagenet2012',
    'exits': [exit_cost(12, True, 'exit 11', *[99_999_999_999] * 5)],
  }
  assert max(map(len, describe_table(description).splitlines())) <= 100


def test_evaluation_table():
  measured = {'exit': 2, 'trained': True, 'accuracy': 0.65674, 'top5': 0.9, 'loss': 1.23456, 'nll': 12.5}
  untrained = {'exit': 1, 'trained': False, 'accuracy': 0.01, 'top5': 0.05, 'loss': 4.6, 'nll': None}
  # A data set of two classes has no top-5 accuracy.
  two_classes = {'exit': 1, 'trained': True, 'accuracy': 1.0, 'top5': None, 'loss': 0.0, 'nll': 0.0}
  assert evaluation_table({'held_out': [untrained, measured], 'test': [two_classes]}).splitlines() == [
    'split     exit  accuracy (%)  top-5 (%)    loss      nll',
    'held_out     1             —          —       —        —',
    'held_out     2         65.67      90.00  1.2346  12.5000',
    'test         1        100.00          —  0.0000   0.0000',
  ]


@pytest.mark.parametrize(
  ('count', 'expected'),
  [
    (0, '0'),
    (9_999, '9,999'),
    (10_000, '10.0 k'),
    (198_460, '198.5 k'),
    (999_960, '1.00 M'),
    (3_405_684, '3.41 M'),
    (125_943_456, '125.94 M'),
    (1_234_567_890, '1.23 G'),
  ],
)
def test_human_count(count, expected):
  assert human_count(count) == expected
