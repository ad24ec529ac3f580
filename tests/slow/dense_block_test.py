"""The C++ kernels at every width; tests/models/layers/dense_block_test.py compiles those of one."""

import os
import subprocess
import sys

import pytest

from paranet_jax.host.native import missing
from paranet_jax.models.layers import native_dense
from paranet_jax.models.layers.native_inference import AVX512
from tests.models.layers import dense_block_test as blocks

pytestmark = blocks.kernels_only


@pytest.mark.parametrize('growth, bn_size', [(4, 4), (8, 4), (12, 4), (16, 4), (24, 4), (32, 4)])
def test_kernels_equal_the_plain_block(growth, bn_size, monkeypatch):
  assert growth * bn_size in native_dense.WIDTHS
  monkeypatch.setattr(native_dense, 'MIN_MACS', 0)
  monkeypatch.setitem(blocks.SHAPES, 'kernels', (18, 8, 21, 3, growth, bn_size))
  blocks.test_training_equals_the_plain_block('kernels', 'cpu', 1)
  blocks.test_inference_equals_the_plain_block('kernels')


@pytest.mark.skipif(bool(missing(AVX512)), reason=f'{missing(AVX512)}: the kernels are those with AVX2')
def test_a_processor_with_avx512_also_computes_right_without(tmp_path):
  compiler = tmp_path / 'g++'
  compiler.write_text('#!/bin/sh\ntouch "$0.called"\nexec g++ "$@" -mno-avx512f\n')
  compiler.chmod(0o755)
  chosen = f'{__file__}::test_kernels_equal_the_plain_block'
  process = subprocess.run(
    [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', chosen],
    env={**os.environ, 'CXX': str(compiler)},
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0 and '6 passed' in process.stdout, process.stdout + process.stderr
  assert (tmp_path / 'g++.called').exists()


BITS = """
import hashlib
import jax
import numpy as np
from paranet_jax.models.layers import native_inference
from paranet_jax.models.layers.dense import max_pooled_stem
from paranet_jax.models.layers.dense_block import dense_block_inference
from paranet_jax.models.numerics import drawn_layers

native_inference.MIN_MACS = 0
random = np.random.default_rng(0)
layers, kernel = drawn_layers(random, 24, 3, 12, 4), random.normal(size=(3, 3, 3, 24)).astype(np.float32)
for batch in (1, 3, 16, 48):
  x = random.normal(size=(batch, 8, 8, 24)).astype(np.float32)
  images = random.normal(size=(batch, 32, 32, 3)).astype(np.float32)
  block = np.asarray(jax.jit(dense_block_inference)(x, layers))
  stem = native_inference.entry_kernels(images.shape, 24, 1, images.dtype)
  found = block if stem is None else np.concatenate([block.ravel(), np.asarray(stem.entry(images, kernel, 1)).ravel()])
  print(hashlib.sha256(found.tobytes()).hexdigest())
"""


def test_the_number_of_threads_changes_no_bits():
  """With one thread for all images, several for some each, and more than there are images."""
  found = []
  for threads in ('1', '2', '5'):  # NPROC is what XLA takes for the number of cores.
    process = subprocess.run([sys.executable, '-c', BITS], env={**os.environ, 'NPROC': threads}, capture_output=True)
    assert process.returncode == 0, process.stderr.decode()
    found.append(process.stdout.split())
  assert len(found[0]) == 4 and found[0] == found[1] == found[2]
