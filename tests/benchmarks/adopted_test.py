"""docs/adopt.md has the table that was measured, and folders of images become a split."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import adopted
from paranet_jax.host.errors import UserError


def test_the_page_has_the_table_that_was_measured():
  found = json.loads(adopted.RESULTS.read_text())
  assert adopted.table(found) in adopted.PAGE.read_text()
  assert found['exits'][-1] == {'cost': 1.0, 'accuracy': pytest.approx(0.832), 'agreement': 1.0}
  assert [row['budget'] for row in found['rows']] == [share for share in adopted.SHARES if share >= 0.35]
  for row in found['rows']:
    assert sum(row['shares']) == pytest.approx(1)


def test_class_folders_become_a_split(tmp_path):
  for name, shade in (('dog', 9), ('cat', 7)):
    (tmp_path / name).mkdir()
    Image.new('RGB', (4, 4), (shade, 0, 0)).save(tmp_path / name / 'one.png')
  split = adopted.read_folder(tmp_path, ('dog', 'cat', 'cow'), 4)
  np.testing.assert_array_equal(split.labels, [1, 0])
  np.testing.assert_array_equal(split.images[:, 0, 0, 0], [7, 9])
  (tmp_path / 'fish').mkdir()
  with pytest.raises(UserError, match=r'expected folders named as classes \(dog, cat, cow\) in .*; set --images'):
    adopted.read_folder(tmp_path, ('dog', 'cat', 'cow'), 4)
