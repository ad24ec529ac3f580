"""Bundles of the networks that tests/export/families_test.py leaves out."""

import pytest
from exportable import MODELS, QUICK, assert_bundle_answers_as_the_jax_runtime


@pytest.mark.parametrize('name', sorted(MODELS.keys() - set(QUICK)))
def test_the_bundle_answers_as_the_jax_runtime(name, tmp_path):
  assert_bundle_answers_as_the_jax_runtime(name, tmp_path)
