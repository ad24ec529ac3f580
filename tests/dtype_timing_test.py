"""Tests of timing both dtypes: what is timed, the figures, and that they are remembered."""

import json

import jax
import jax.numpy as jnp
import pytest
import tiny

from paranet_jax import dtype_timing
from paranet_jax.dtype_timing import Part, Timing, measure, programs
from paranet_jax.models.resnet import ResNet

SHAPE = (8, 8, 3)


def test_the_middle_layers_of_the_largest_dense_block_are_timed(monkeypatch):
  asked = []
  monkeypatch.setattr(dtype_timing, 'dense_layers', lambda *args, **kwargs: asked.append((args, kwargs)) or Program())
  timed = programs(tiny.network(1, layers_per_block=7, growth_rate=3), SHAPE, 4)
  # Layers 3 and 4 of 7, at side 4: a stem of 6 channels, and 3 of each layer before them.
  wanted = [{'train': True, 'dtype': dtype, 'of': 7} for dtype in (jnp.float32, jnp.bfloat16)]
  assert asked == [(((4, 4, 4, 12), 2, 3, 2), keywords) for keywords in wanted]
  assert timed and (timed.name, timed.float32(), timed.bfloat16(), timed.margin) == ('layers', 1, 1, 1.0)


class Program:
  name = 'layers'

  def compute(self):
    return 1


def test_other_networks_time_their_largest_convolution():
  name, *both, margin = programs(ResNet(depth=8, num_classes=3, image_side=8), SHAPE, 4)
  # Of the three stages with the same work at 8 x 8 x 16, 4 x 4 x 32 and 2 x 2 x 64, the first.
  assert margin == 1.25 and name == 'a convolution of [4, 8, 8, 16] and [3, 3, 16, 16] with its gradients'
  for program, dtype in zip(both, (jnp.float32, jnp.bfloat16), strict=True):
    value, gradients = program()
    assert [(leaf.shape, leaf.dtype) for leaf in gradients] == [((4, 8, 8, 16), dtype), ((3, 3, 16, 16), dtype)]
    assert value > 0 and all(bool(jnp.any(leaf != 0)) for leaf in gradients)


def test_each_figure_is_the_median_of_its_program(monkeypatch):
  monkeypatch.setattr(dtype_timing, 'SECONDS', 0.025)
  now = [0.0]
  monkeypatch.setattr(dtype_timing.time, 'perf_counter', lambda: now[0])

  def program(*taken):
    turns = iter(taken)

    def run():
      now[0] += next(turns) / 1e3

    return run

  # Each compiles for 50 ms in its first call; three rounds take 30 ms.
  timing = measure(Part('it', program(50, 1, 2, 9), program(50, 4, 8, 6), 1.25))
  assert timing == ('it', pytest.approx(2), pytest.approx(6), 1.25) and timing.slower
  assert [Timing('it', 2.0, taken, 1.25).slower for taken in (1.0, 2.0, 2.49, 2.51)] == [False, False, False, True]


def test_measured_once_for_a_network_its_shapes_and_flags(monkeypatch, tmp_path):
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path))
  measured = []
  monkeypatch.setattr(dtype_timing, 'programs', lambda *args: measured.append(args[2]) or Part('it', print, print, 1.0))
  monkeypatch.setattr(dtype_timing, 'measure', lambda part: Timing(part.name, 1.0, 2.0))
  model = tiny.network(1)
  for size in (4, 4, 5):
    assert dtype_timing.dtype_timing(model, SHAPE, size) == Timing('it', 1.0, 2.0)
  assert measured == [4, 5]
  # Which of the two dtypes the model has does not matter.
  dtype_timing.dtype_timing(model.clone(dtype=jnp.bfloat16), SHAPE, 4)
  assert measured == [4, 5]
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_parallel_codegen_split_count=1')
  dtype_timing.dtype_timing(model, SHAPE, 5)
  assert measured == [4, 5, 5]
  for file in tmp_path.glob('dtype/*.json'):  # Damaged.
    file.write_text(json.dumps({'part': 'it'}))
  assert dtype_timing.dtype_timing(model, SHAPE, 5) == Timing('it', 1.0, 2.0) and measured == [4, 5, 5, 5]
  monkeypatch.setenv('PARANET_CACHE_DIR', 'gs://bucket')  # No cache.
  dtype_timing.dtype_timing(model, SHAPE, 5)
  assert measured == [4, 5, 5, 5, 5]


def test_a_network_without_products_has_no_timing(monkeypatch, tmp_path):
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path))
  monkeypatch.setattr(dtype_timing, 'abstract_variables', lambda *_: {})
  monkeypatch.setattr(dtype_timing, 'largest_block', lambda *_: None)
  assert dtype_timing.dtype_timing(Sums(), SHAPE, 2) is None
  assert not list(tmp_path.glob('dtype/*'))


class Sums:
  def clone(self, dtype):
    return self

  def apply(self, variables, images):
    return jax.tree.map(jnp.sum, images)
