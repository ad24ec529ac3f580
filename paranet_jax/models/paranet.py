"""ParaNet: P pipelines of dense blocks, one exit each, later pipelines reading earlier ones (paper, section 3)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from paranet_jax.host.errors import UserError
from paranet_jax.models.layers.conv import convolve
from paranet_jax.models.layers.dense import (
  DenseBlock,
  Exit,
  Features,
  Kernel,
  Transition,
  as_features,
  average_pool,
  concatenate,
  max_pool,
  max_pooled_stem,
  norm_affine,
  overlapping_max_pool,
)
from paranet_jax.models.layers.dense_block import affine_relu, image_conv3x3
from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.multi_exit import Carry, Graph, Images, Logits, Node
from paranet_jax.targets import parse_name

_POOLS = {'max': max_pool, 'avg': average_pool, 'max3x3': overlapping_max_pool}


@dataclasses.dataclass(frozen=True)
class Geometry:
  """The graph of a ParaNet's blocks (spec: Architecture).

  Block (p, b), 1-based, is block b of pipeline p. It reads block (p, b - 1) through a transition, or the pipeline's
  entry if b = 1, and, if there is a cascade edge, block (p - 1, b - 1) unchanged.

  Attributes:
    image_side: S, pixels.
    blocks: dense blocks of each pipeline.
    halvings: 2x2 poolings at the entry of each pipeline.
    cascade: the blocks (p, b) that also read block (p - 1, b - 1).

  Raises:
    ValueError: the shapes do not fit together; the message is one line.
  """

  image_side: int
  blocks: tuple[int, ...]
  halvings: tuple[int, ...]
  cascade: tuple[Node, ...]

  def __post_init__(self):
    if len(self.blocks) != len(self.halvings):
      raise ValueError(f'blocks {self.blocks} and halvings {self.halvings} must have one entry for each pipeline')
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

  @property
  def sides(self) -> list[int]:
    """The sides of all blocks, each once, the largest first."""
    nodes = [(pipeline, index) for pipeline, count in enumerate(self.blocks, 1) for index in range(1, count + 1)]
    return sorted({self.side(node) for node in nodes}, reverse=True)

  def exit_node(self, number: int) -> Node:
    """The block that exit `number` (1-based) reads: the last block of its pipeline."""
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


class ParaNet(Graph):
  """A ParaNet (spec: Architecture).

  Attributes:
    num_pipelines: P.
    layers_per_block: n, dense layers in every block (L = 6 n + 4 names the three-pipeline network).
    growth_rate: k, channels that a dense layer adds in the blocks of the largest side.
    growth_factors: one for each side of blocks, the largest first: multiply k there, and a stem's 2 k channels; (): 1
      each.
    bn_size: bottleneck width in multiples of k.
    blocks: dense blocks of each pipeline; None: pipeline p has p.
    halvings: 2x2 poolings at the entry of each pipeline; None: P + 1 - p.
    cascade: True: every edge; False: none (`cut`); or the blocks (p, b) that also read block (p - 1, b - 1).
    stem_norm: whether BN-ReLU follows the stem's convolution.
    stem: '3x3', or '7x7' with stride 2, which halves the image once more.
    entry_pool: how the entry halves: 'max' or 'avg' (2x2), or 'max3x3' (overlapping, with stride 2).
    entry_order: 'stem_first' (convolve the whole image, then pool) or 'pool_first'.
    dropout: rate after each convolution except a stem's in training, which needs a `dropout` key.
    scan_layers: dense layers compiled as one loop in training (see `dense_block.py`); None: the backend's default.

  Raises:
    ValueError: the shapes do not fit together (see `Geometry`); the message is one line.
  """

  num_pipelines: int = 3
  num_classes: int = 100
  layers_per_block: int = 16
  growth_rate: int = 12
  growth_factors: tuple[int, ...] = ()
  bn_size: int = 4
  blocks: tuple[int, ...] | None = None
  halvings: tuple[int, ...] | None = None
  cascade: bool | tuple[Node, ...] = True
  stem_norm: bool = False
  stem: str = '3x3'
  entry_pool: str = 'max'
  entry_order: str = 'stem_first'
  dropout: float = 0.0
  image_side: int = 32
  channels: int = 3
  dtype: Any = jnp.float32
  scan_layers: int | None = None
  axis_name: str | None = None

  initial_variables = staticmethod(initial_variables)

  @property
  def geometry(self) -> Geometry:
    """The graph of blocks and the side of each."""
    blocks = self.blocks or default_blocks(self.num_pipelines)
    halvings = default_halvings(self.num_pipelines) if self.halvings is None else self.halvings
    cascade = self.cascade if isinstance(self.cascade, tuple) else full_cascade(blocks) if self.cascade else ()
    return Geometry(self.image_side, blocks, tuple(times + self._stem_halvings for times in halvings), cascade)

  def growth(self, node: Node) -> int:
    """Channels that a dense layer of this block adds.

    Raises:
      ValueError: `growth_factors` does not have one entry for each side.
    """
    if not self.growth_factors:
      return self.growth_rate
    sides = self.geometry.sides
    if len(self.growth_factors) != len(sides):
      raise ValueError(
        f'growth_factors {self.growth_factors} must have one entry for each side of blocks, the largest first: {sides}'
      )
    return self.growth_rate * self.growth_factors[sides.index(self.geometry.side(node))]

  @property
  def _stem_halvings(self) -> int:
    return int(self.stem == '7x7')

  @property
  def rng_names(self) -> tuple[str, ...]:
    """Random keys that training needs."""
    return ('dropout',) if self.dropout else ()

  @property
  def num_exits(self) -> int:
    """P, one exit per pipeline."""
    return self.num_pipelines

  def node_features(self, node: Node, images: Images, features: Carry, train: bool) -> Features:
    """A dense block on its transition or the pipeline's entry, joined with the cascade."""
    pipeline, index = node
    if index == 1:
      x = self._entry(images, pipeline, train)
    else:
      name = f'pipeline_{pipeline}_transition_{index - 1}'
      transition = Transition(self.axis_name, dropout=self.dropout, name=name)
      x = transition(features[pipeline, index - 1], train)
    if node in self.geometry.cascade:
      x = concatenate(x, features[pipeline - 1, index - 1])
    block = DenseBlock(
      self.layers_per_block,
      self.growth(node),
      self.bn_size,
      self.scan_layers,
      self.axis_name,
      self.dropout,
      name=f'pipeline_{pipeline}_block_{index}',
    )
    return block(x, train)

  def exit_logits(self, x: Features, number: int, train: bool) -> Logits:
    """BN-ReLU-pool-linear."""
    return Exit(self.num_classes, name=f'exit_{number}')(x, train)

  def _entry(self, images: Images, pipeline: int, train: bool) -> Features:
    x = images.astype(self.dtype)
    plain_stem = not self._stem_halvings and not self.stem_norm
    if self.entry_order == 'pool_first':
      x = self._stem(self._halve(x, pipeline), pipeline, train)
    elif self.entry_pool == 'max' and plain_stem:
      x = max_pooled_stem(x, self._stem_kernel(x, pipeline), self.geometry.halvings[pipeline - 1], train)
    else:
      x = self._halve(self._stem(x, pipeline, train), pipeline)
    return as_features(x, train, self.axis_name)

  def _stem(self, x: Array, pipeline: int, train: bool) -> Array:
    kernel = self._stem_kernel(x, pipeline)
    x = convolve(x, kernel, stride=2) if self._stem_halvings else image_conv3x3(x, kernel)
    if not self.stem_norm:
      return x
    features = as_features(x, train, self.axis_name)
    return affine_relu(features.values, *norm_affine(features, train, f'pipeline_{pipeline}_stem_norm'))

  def _stem_kernel(self, x: Array, pipeline: int) -> Array:
    size = int(self.stem[0])
    shape = size, size, x.shape[-1], 2 * self.growth((pipeline, 1))
    return Kernel(shape, name=f'pipeline_{pipeline}_stem')()

  def _halve(self, x: Array, pipeline: int) -> Array:
    for _ in range(self.geometry.halvings[pipeline - 1] - self._stem_halvings):
      x = _POOLS[self.entry_pool](x)
    return x


def from_fields(name: str, fields: dict[str, Any]) -> ParaNet:
  """Builds the network from a run's name and configuration fields.

  Raises:
    UserError: the name is invalid, or `blocks` and `halvings` do not fit it.
    ValueError: the shapes do not fit together.
  """
  parsed = parse_name(name)
  if fields['cascade'] is None:
    fields['cascade'] = parsed.cascade
  else:
    edges = (map(int, edge.split('.')) for edge in fields['cascade'].split(',') if edge)
    fields['cascade'] = tuple(sorted((pipeline, block) for pipeline, block in edges))
  model = ParaNet(parsed.num_pipelines, **fields)
  geometry = model.geometry
  if len(geometry.blocks) != parsed.num_pipelines:
    raise UserError(
      f'model.blocks and model.halvings must have {parsed.num_pipelines} entries, one for each pipeline of {name}, '
      f'found {geometry.blocks} and {geometry.halvings}; set --config.model.blocks and --config.model.halvings'
    )
  model.growth((1, 1))  # Whether the factors fit, before anything is traced.
  return model
