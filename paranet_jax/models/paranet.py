"""ParaNet: P pipelines of dense blocks, one exit each, later pipelines reading earlier ones (paper, section 3)."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from paranet_jax.host.errors import UserError
from paranet_jax.models import paranet_geometry as geo
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
  norm_affine,
  overlapping_max_pool,
)
from paranet_jax.models.layers.dense_block import affine_relu, image_conv3x3
from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.multi_exit import Carry, Graph, Images, Logits, Node
from paranet_jax.targets import parse_name

_POOLS = {'max': max_pool, 'avg': average_pool, 'max3x3': overlapping_max_pool}


class ParaNet(Graph):
  """A ParaNet (spec: Architecture). Images are normalized floats [B, image_side, image_side, channels].

  Attributes:
    num_pipelines: P.
    num_classes: width of every exit.
    layers_per_block: n, dense layers in every block (L = 6 n + 4 names the three-pipeline network).
    growth_rate: k.
    bn_size: bottleneck width in multiples of k.
    blocks: dense blocks of each pipeline; None: pipeline p has p.
    halvings: 2x2 poolings at the entry of each pipeline; None: P + 1 - p.
    cascade: True: every edge; False: none (`cut`); or the blocks (p, b) that also read block (p - 1, b - 1).
    stem_norm: BN-ReLU after the stem's convolution.
    stem: '3x3', or '7x7': of stride 2, which halves the image once more.
    entry_pool: 'max' or 'avg' (2x2), or 'max3x3' (of stride 2, overlapping), how the entry halves.
    entry_order: 'stem_first' (convolve the whole image, then pool) or 'pool_first'.
    dropout: rate after each convolution but a stem's in training, with a key `dropout`.
    image_side: S, pixels.
    dtype: of the computation; parameters, statistics and logits are float32.
    scan_layers: dense layers compiled as one loop in training (see `dense_block.py`); None: the backend's default.
    axis_name: device axis over which batch statistics are shared in training.

  Raises:
    ValueError: the shapes do not fit (see `Geometry`), in one line.
  """

  num_pipelines: int = 3
  num_classes: int = 100
  layers_per_block: int = 16
  growth_rate: int = 12
  bn_size: int = 4
  blocks: tuple[int, ...] | None = None
  halvings: tuple[int, ...] | None = None
  cascade: bool | tuple[geo.Node, ...] = True
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
  def geometry(self) -> geo.Geometry:
    """Which block reads which, at which side."""
    blocks = self.blocks or geo.default_blocks(self.num_pipelines)
    halvings = geo.default_halvings(self.num_pipelines) if self.halvings is None else self.halvings
    cascade = self.cascade if isinstance(self.cascade, tuple) else geo.full_cascade(blocks) if self.cascade else ()
    return geo.Geometry(self.image_side, blocks, tuple(times + self._stem_halvings for times in halvings), cascade)

  @property
  def _stem_halvings(self) -> int:
    return int(self.stem == '7x7')

  @property
  def rng_names(self) -> tuple[str, ...]:
    """Keys that training needs."""
    return ('dropout',) if self.dropout else ()

  @property
  def num_exits(self) -> int:
    """P, one exit a pipeline."""
    return self.num_pipelines

  def node_features(self, node: Node, images: Images, features: Carry, train: bool) -> Features:
    """A dense block after its transition or the pipeline's entry, and the cascade."""
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
      self.growth_rate,
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
    if self.entry_order == 'pool_first':
      x = self._stem(self._halve(x, pipeline), pipeline, train)
    else:
      x = self._halve(self._stem(x, pipeline, train), pipeline)
    return as_features(x, train, self.axis_name)

  def _stem(self, x: Array, pipeline: int, train: bool) -> Array:
    name = f'pipeline_{pipeline}_stem'
    size = int(self.stem[0])
    kernel = Kernel((size, size, x.shape[-1], 2 * self.growth_rate), name=name)()
    x = convolve(x, kernel, stride=2) if self._stem_halvings else image_conv3x3(x, kernel)
    if not self.stem_norm:
      return x
    features = as_features(x, train, self.axis_name)
    return affine_relu(features.values, *norm_affine(features, train, f'{name}_norm'))

  def _halve(self, x: Array, pipeline: int) -> Array:
    for _ in range(self.geometry.halvings[pipeline - 1] - self._stem_halvings):
      x = _POOLS[self.entry_pool](x)
    return x


def from_fields(name: str, fields: dict[str, Any]) -> ParaNet:
  """The network of a run's name and configuration fields.

  Raises:
    UserError: the name is refused, or `blocks` and `halvings` do not fit it.
    ValueError: the shapes do not fit.
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
      f'model.blocks and model.halvings must have {parsed.num_pipelines} entries, one a pipeline of {name}, '
      f'found {geometry.blocks} and {geometry.halvings}; set --config.model.blocks and --config.model.halvings'
    )
  return model
