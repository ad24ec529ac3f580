"""Tests of the graph of a ParaNet: the side of each block and what it reads."""

import pytest

from paranet_jax.models.paranet import Geometry, default_blocks, default_halvings, full_cascade


def geometry(num_pipelines=3, side=32, cascade=None) -> Geometry:
  blocks = default_blocks(num_pipelines)
  edges = full_cascade(blocks) if cascade is None else cascade
  return Geometry(side, blocks, default_halvings(num_pipelines), edges)


def test_default_pipelines():
  assert (default_blocks(3), default_halvings(3)) == ((1, 2, 3), (3, 2, 1))


@pytest.mark.parametrize(
  'num_pipelines, sides', [(1, [16]), (3, [16, 8, 4]), (4, [16, 8, 4, 2]), (5, [16, 8, 4, 2, 1])]
)
def test_sides_halve_block_by_block_to_a_common_end(num_pipelines, sides):
  """The last block of every pipeline has been pooled P times, the one before it P - 1 times (spec: Architecture)."""
  for pipeline in range(1, num_pipelines + 1):
    found = [geometry(num_pipelines).side((pipeline, block)) for block in range(1, pipeline + 1)]
    assert found == sides[num_pipelines - pipeline :]


@pytest.mark.parametrize(
  'blocks, edges',
  [
    ((1,), ()),
    ((1, 2, 3), ((2, 2), (3, 2), (3, 3))),
    ((2, 2, 2), ((2, 2), (3, 2))),
    ((3, 1, 2), ((3, 2),)),
    ((1, 4), ((2, 2),)),
    ((1, 2, 3, 4), ((2, 2), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4))),
  ],
)
def test_full_cascade_has_every_edge_that_has_a_source(blocks, edges):
  assert full_cascade(blocks) == edges


@pytest.mark.parametrize(
  'cascade, across',
  [
    (None, {(2, 2): ((1, 1),), (3, 2): ((2, 1),), (3, 3): ((2, 2),)}),
    (((3, 3),), {(3, 3): ((2, 2),)}),
    ((), {}),
  ],
)
def test_reads(cascade, across):
  net = geometry(cascade=cascade)
  before = {(2, 2): ((2, 1),), (3, 2): ((3, 1),), (3, 3): ((3, 2),)}
  for node in ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)):
    assert net.reads(node) == before.get(node, ()) + across.get(node, ())
  assert [net.exit_node(pipeline) for pipeline in (1, 2, 3)] == [(1, 1), (2, 2), (3, 3)]


def test_equal_length_pipelines():
  net = Geometry(16, blocks=(2, 2), halvings=(1, 0), cascade=())
  assert [net.side((pipeline, block)) for pipeline in (1, 2) for block in (1, 2)] == [8, 4, 16, 8]


@pytest.mark.parametrize(
  'side, blocks, halvings, cascade, message',
  [
    (32, (1, 2), (3, 2, 1), (), r'blocks \(1, 2\) and halvings \(3, 2, 1\) must have one entry for each pipeline'),
    (32, (1, 0), (2, 1), (), r'blocks \(1, 0\) must be 1 or more and halvings \(2, 1\) 0 or more'),
    (32, (1, 2), (2, -1), (), r'blocks \(1, 2\) must be 1 or more and halvings \(2, -1\) 0 or more'),
    (28, (1, 2, 3), (3, 2, 1), (), r'image_side 28 cannot be halved 3 times, as pipeline 1 needs \(3 at its entry, 0 '),
    (4, (1, 3), (2, 1), (), r'image_side 4 cannot be halved 3 times, as pipeline 2 needs \(1 at its entry, 2 between '),
    (0, (1,), (0,), (), r'image_side 0 cannot be halved 0 times, as pipeline 1 needs'),
    (32, (1, 2), (2, 1), ((1, 2),), r'cascade into block 2 of pipeline 1: it needs a block 1 in pipeline 0'),
    (32, (1, 2), (2, 1), ((3, 2),), r'cascade into block 2 of pipeline 3: it needs a block 1 in pipeline 2'),
    (32, (1, 2), (2, 1), ((2, 1),), r'cascade into block 1 of pipeline 2: it needs a block 0 in pipeline 1'),
    (32, (1, 2), (2, 1), ((2, 3),), r'cascade into block 3 of pipeline 2: it needs a block 2 in pipeline 1'),
    (32, (1, 3), (2, 1), ((2, 3),), r'it needs a block 2 in pipeline 1, and the pipelines have \(1, 3\) blocks'),
    (
      32,
      (2, 2),
      (1, 1),
      ((2, 2),),
      'into block 2 of pipeline 2 joins different sides: it works at 8 x 8 and block 1 of pipeline 1 at 16 x 16',
    ),
  ],
)
def test_invalid_shapes_are_refused(side, blocks, halvings, cascade, message):
  with pytest.raises(ValueError, match=message) as error:
    Geometry(side, blocks, halvings, cascade)
  assert len(str(error.value).splitlines()) == 1
