"""Tests of the graph of an MSDNet: its layers and scales, and what each reads."""

import pytest

from paranet_jax.models.msdnet import Geometry, block_layers

BUDGETED = Geometry(32, 3, (1, 2, 3, 4, 5))


@pytest.mark.parametrize(
  'fields, layers, exits',
  [
    ((7, 'even', 2, 4), (4, 2, 2, 2, 2, 2, 2), (4, 6, 8, 10, 12, 14, 16)),
    ((5, 'lin_grow', 1, 1), (1, 2, 3, 4, 5), (1, 3, 6, 10, 15)),
    ((3, 'lin_grow', 2, 3), (3, 3, 5), (3, 6, 11)),
    ((1, 'even', 2, 4), (4,), (4,)),
    ((2, 'even', 1, 1), (1, 1), (1, 2)),
  ],
)
def test_layers_of_blocks(fields, layers, exits):
  assert block_layers(*fields) == layers
  assert Geometry(32, 3, layers).exit_layers == exits


@pytest.mark.parametrize(
  'layers, num_scales, finest, drops',
  [
    ((1, 2, 3, 4, 5), 3, [1] * 6 + [2] * 5 + [3] * 5, [6, 11]),
    ((4, 2, 2, 2, 2, 2, 2), 3, [1] * 7 + [2] * 6 + [3] * 4, [7, 13]),
    ((2, 2), 3, [1, 1, 1, 2, 2], [3]),
    ((3,), 1, [1, 1, 1, 1], []),
    ((1, 1), 2, [1, 1, 2], [2]),
  ],
)
def test_layers_drop_scales_from_the_finest(layers, num_scales, finest, drops):
  geometry = Geometry(32, num_scales, layers)
  assert [geometry.finest(layer) for layer in range(len(finest))] == finest
  assert [layer for layer in range(1, len(finest)) if geometry.drops(layer)] == drops


@pytest.mark.parametrize(
  'node, reads',
  [
    ((0, 1), ()),
    ((0, 2), ((0, 1),)),
    ((0, 3), ((0, 2),)),
    ((1, 1), ((0, 1),)),
    ((1, 2), ((0, 2), (0, 1))),
    ((5, 3), ((4, 3), (4, 2))),
    ((6, 2), ((5, 2), (5, 1))),
    ((7, 2), ((6, 2),)),
    ((7, 3), ((6, 3), (6, 2))),
    ((11, 3), ((10, 3), (10, 2))),
    ((12, 3), ((11, 3),)),
  ],
)
def test_reads(node, reads):
  assert BUDGETED.reads(node) == reads


def test_exits_read_the_coarsest_scale():
  assert [BUDGETED.exit_node(number) for number in range(1, 6)] == [(1, 3), (3, 3), (6, 3), (10, 3), (15, 3)]


@pytest.mark.parametrize(
  'fields, message',
  [
    ((2, 3, (1,)), 'image_side must be a multiple of 4, to be halved 2 times, found 2'),
    ((32, 3, (1, 0)), r'an MSDNet needs 1 or more blocks of 1 or more layers, found blocks of \(1, 0\)'),
    ((32, 0, (1,)), 'an MSDNet needs 1 or more scales, each with a growth factor, found 0'),
  ],
)
def test_invalid_shapes_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Geometry(*fields)
