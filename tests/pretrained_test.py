"""The pretrained run is small, complete and exact; tests/slow measures its accuracy."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import paranet_jax

FOLDER = Path(__file__).resolve().parents[1] / 'pretrained'
ABSOLUTE = re.compile(rb'(^|[ =:"\'])/[\w.-]+/')
"""The start of an absolute path."""
IN_ARRAYS = re.compile(rb'(^|[ =:"\'])/[\w.-]{3,}/')
"""The same in compressed arrays, where a shorter one, such as `/Y/`, occurs by chance."""


@pytest.fixture(scope='module')
def run():
  return paranet_jax.load(FOLDER)


def test_size_below_six_megabytes():
  assert sum(path.stat().st_size for path in FOLDER.rglob('*') if path.is_file()) < 6e6


def test_parameters_are_exact_in_float16(run):
  for leaf in jax.tree.leaves(run.variables['params']):
    np.testing.assert_array_equal(leaf, np.asarray(leaf).astype(np.float16).astype(np.float32))


def test_the_log_ends_with_the_accuracies_of_the_summary(run):
  lines = [json.loads(line) for line in (FOLDER / 'metrics.jsonl').read_text().splitlines()]
  summary = json.loads((FOLDER / 'summary.json').read_text())
  last = [line for line in lines if line['split'] == 'test'][-1]
  assert (last['step'], run.step) == (summary['steps'], summary['steps'])
  assert [last[f'exit_{row["exit"]}/accuracy'] for row in summary['exits']] == [
    row['accuracy'] for row in summary['exits']
  ]


def test_no_absolute_path():
  for path in FOLDER.rglob('*'):
    if path.is_file():
      pattern = IN_ARRAYS if path.parent.name == 'd' else ABSOLUTE
      assert not pattern.search(path.read_bytes()), path
