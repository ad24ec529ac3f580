"""Tests of the tables on the terminal."""

import numpy as np
import pytest

from paranet_jax.display.tables import class_table, describe_table, evaluation_table, human_count, rounded


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
  names = ('exit', 'trained', 'accuracy', 'balanced_accuracy', 'top5', 'loss', 'nll')
  measured = dict(zip(names, (2, True, 0.65674, 0.5, 0.9, 1.23456, 12.5), strict=True))
  untrained = dict(zip(names, (1, False, 0.01, 0.01, 0.05, 4.6, None), strict=True))
  # A data set of two classes has no top-5 accuracy.
  two_classes = dict(zip(names, (1, True, 1.0, 1.0, None, 0.0, 0.0), strict=True))
  assert evaluation_table({'held_out': [untrained, measured], 'test': [two_classes]}).splitlines() == [
    'split     exit  accuracy (%)  balanced (%)  top-5 (%)    loss      nll',
    'held_out     1             —             —          —       —        —',
    'held_out     2         65.67         50.00      90.00  1.2346  12.5000',
    'test         1        100.00        100.00          —  0.0000   0.0000',
  ]


def row(number, accuracies, matrix=None) -> dict:
  matrix = None if matrix is None else np.array(matrix)
  return {'exit': number, 'trained': accuracies is not None, 'class_accuracy': accuracies, 'confusion': matrix}


def test_without_labels_the_agreement_is_shown():
  rows = [{'exit': 1, 'trained': True, 'agreement': 0.875}, {'exit': 2, 'trained': False, 'agreement': None}]
  assert evaluation_table({'test': rows}).splitlines() == [
    'split  exit  same answer as the last exit (%)',
    'test      1                             87.50',
    'test      2                                 —',
  ]


def test_class_table():
  # Of 4 cats 1 is taken for a dog and 1 for a cow; the first of equals is shown. No image is of the fourth class.
  exits = [
    row(1, None),
    row(2, [0.25, 1.0, 0.5, None], np.eye(4, dtype=int)),
    row(3, [0.5, 1.0, 0.25, None], [[2, 1, 1, 0], [0, 1000, 0, 0], [0, 3, 1, 0], [0, 0, 0, 0]]),
  ]
  assert class_table(exits, ['cat', 'do\x1bg', 'a cow whose name is too long', 'fox']).splitlines() == [
    'all classes on test images, least accurate at exit 3 first',
    'class                 images  exit 2 (%)  exit 3 (%)  most often taken for',
    'a cow whose name is…       4       50.00       25.00  do\\x1bg (3)',
    'cat                        4       25.00       50.00  do\\x1bg (1)',
    'do\\x1bg                1,000      100.00      100.00  —',
  ]


def test_class_table_of_many_classes_and_exits():
  # More classes than a matrix may have.
  exits = [row(number, [share / 3000 for share in range(3000)]) for number in range(1, 11)]
  lines = class_table(exits, ['w' * 99] * 3000).splitlines()
  assert lines[0] == 'the 10 least accurate of 3,000 classes on test images, least accurate at exit 10 first'
  assert len(lines) == 12 and max(map(len, lines)) <= 100
  assert lines[1].split('  ')[-4:] == ['exit 1 (%)', 'exit 9 (%)', 'exit 10 (%)', 'most often taken for']
  assert lines[2].split()[1:] == ['—', '0.00', '0.00', '0.00', '—']


def test_a_chinese_character_takes_two_columns_and_an_accent_none():
  lines = class_table([row(1, [0.5, 0.25])], ['cafe\u0301', '\u732b' * 30]).splitlines()[1:]
  assert lines == [
    'class                images  exit 1 (%)  most often taken for',
    # 9 characters fit the 20 columns, beside the mark of what is cut.
    9 * '\u732b' + '\u2026       \u2014       25.00  \u2014',
    'cafe\u0301                      \u2014       50.00  \u2014',
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


@pytest.mark.parametrize(
  'value, digits, expected',
  [
    (0.012345, 3, '0.0123'),
    (999.4, 3, '999'),
    (999.6, 3, '1,000'),  # In scientific notation, it would be 1e+03.
    (1234.6, 3, '1,235'),
    (32.5007, 4, '32.5'),
    (20000, 4, '20,000'),
  ],
)
def test_numbers_keep_their_integer_digits(value, digits, expected):
  assert rounded(value, digits) == expected
