"""Where each dense block of a ParaNet works and what it reads: plain arithmetic, no arrays.

A block is named (p, b), both 1-based: block b of pipeline p. It reads block (p, b - 1) through a transition, or the
pipeline's entry when b = 1, and, where there is a cascade edge, block (p - 1, b - 1) as it is.
"""

import dataclasses

Node = tuple[int, int]
"""Block (p, b)."""


@dataclasses.dataclass(frozen=True)
class Geometry:
  """The graph of a ParaNet (spec: Architecture).

  Attributes:
    image_side: S, pixels.
    blocks: dense blocks of each pipeline.
    halvings: 2x2 poolings at the entry of each pipeline.
    cascade: the blocks (p, b) that also read block (p - 1, b - 1).

  Raises:
    ValueError: the shapes do not fit, in one line.
  """

  image_side: int
  blocks: tuple[int, ...]
  halvings: tuple[int, ...]
  cascade: tuple[Node, ...]

  def __post_init__(self):
    if len(self.blocks) != len(self.halvings):
      raise ValueError(f'blocks {self.blocks} and halvings {self.halvings} must have one entry a pipeline each')
    if min(self.blocks) < 1 or min(self.halvings) < 0:
      raise ValueError(f'blocks {self.blocks} must be 1 or more and halvings {self.halvings} 0 or more')
    for pipeline, num_blocks in enumerate(self.blocks, 1):
      times = self.halvings[pipeline - 1] + num_blocks - 1
      if self.image_side < 1 or times >= self.image_side.bit_length() or self.image_side % 2**times:
        raise ValueError(
          f'image_side {self.image_side} cannot be halved {times} times, as pipeline {pipeline} needs '
          f'({self.halvings[pipeline - 1]} at its entry, {num_blocks - 1} between its blocks)'
        )
    for block in self.cascade:
      self._check_edge(*block)

  def _check_edge(self, pipeline: int, block: int) -> None:
    exists = (
      2 <= pipeline <= len(self.blocks)
      and 2 <= block <= self.blocks[pipeline - 1]
      and block - 1 <= self.blocks[pipeline - 2]
    )
    if not exists:
      raise ValueError(
        f'cascade into block {block} of pipeline {pipeline}: it needs a block {block - 1} in pipeline {pipeline - 1}, '
        f'and the pipelines have {self.blocks} blocks'
      )
    source, target = self.side((pipeline - 1, block - 1)), self.side((pipeline, block))
    if source != target:
      raise ValueError(
        f'cascade into block {block} of pipeline {pipeline} joins different sides: it works at {target} x {target} '
        f'and block {block - 1} of pipeline {pipeline - 1} at {source} x {source}'
      )

  def side(self, node: Node) -> int:
    """Side of a block's features, in pixels."""
    pipeline, index = node
    return self.image_side // 2 ** (self.halvings[pipeline - 1] + index - 1)

  def exit_node(self, number: int) -> Node:
    """The block that exit `number` (1-based) reads: the last one of its pipeline."""
    return (number, self.blocks[number - 1])

  def reads(self, node: Node) -> tuple[Node, ...]:
    """The blocks that a block reads; none for the first block of a pipeline."""
    pipeline, index = node
    own = ((pipeline, index - 1),) if index > 1 else ()
    return own + (((pipeline - 1, index - 1),) if node in self.cascade else ())


def default_blocks(num_pipelines: int) -> tuple[int, ...]:
  """Pipeline p has p dense blocks."""
  return tuple(range(1, num_pipelines + 1))


def default_halvings(num_pipelines: int) -> tuple[int, ...]:
  """P + 1 - p halvings at the entry of pipeline p."""
  return tuple(range(num_pipelines, 0, -1))


def full_cascade(blocks: tuple[int, ...]) -> tuple[Node, ...]:
  """Every cascade edge that has a source."""
  return tuple(
    (pipeline, index)
    for pipeline in range(2, len(blocks) + 1)
    for index in range(2, min(blocks[pipeline - 1], blocks[pipeline - 2] + 1) + 1)
  )
