"""The C++ kernels at every width; tests/models/layers/dense_block_test.py compiles those of one."""

import pytest

from paranet_jax.models.layers import native_dense
from tests.models.layers import dense_block_test as blocks

pytestmark = blocks.kernels_only


@pytest.mark.parametrize('growth, bn_size', [(4, 4), (8, 4), (12, 4), (16, 4), (24, 4), (32, 4)])
def test_kernels_equal_the_plain_block(growth, bn_size, monkeypatch):
  assert growth * bn_size in native_dense.WIDTHS
  monkeypatch.setattr(native_dense, 'MIN_MACS', 0)
  monkeypatch.setitem(blocks.SHAPES, 'kernels', (18, 8, 21, 3, growth, bn_size))
  blocks.test_training_equals_the_plain_block('kernels', 'cpu', 1)
  blocks.test_inference_equals_the_plain_block('kernels')
