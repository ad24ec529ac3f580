"""FractalNet (Larsson et al. 2017) with an exit for each column alone, shallow to deep, and one for the whole network.

A block of C columns has 2^(C-1) rows. Column c has 2^(c-1) convolutions, one ending every 2^(C-c) rows. Columns with a
convolution ending in the same row are joined by their mean, which all of them read next. B blocks make B 2^(C-1)
layers: 20 with B = 5, C = 3 and 40 with C = 4.

Column c alone is the plain network of its own convolutions, with the same weights, statistics and classifier (section
4.3). It shares with the whole network only the features before its first join, in the first block, which are computed
once.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from paranet_jax.models.layers.conv import Classifier, batch_norm_relu, convolve
from paranet_jax.models.layers.dense import Kernel, max_pool
from paranet_jax.models.layers.dense_block import image_conv3x3
from paranet_jax.models.layers.drop import DropPath, draw, dropout, join_weights
from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.multi_exit import MultiExit, check_halvings

Paths = dict[tuple[int, ...], Float[Array, 'B H W C']]
"""Features by the exits that they lead to: exits share an entry for as long as their features are the same."""


class FractalNet(MultiExit):
  """A FractalNet. Exits 1..C are the columns alone, exit C + 1 is the whole network.

  In training, a convolution's batch statistics cover all passes through it from the exits trained together, since they
  also share its running statistics. A `drop_path` key turns drop-path on, for the whole network only; dropout needs a
  `dropout` key. Both keys must be the same on every device. A stage carries the features that reach each column's first
  join in the first block, by column.

  Attributes:
    columns: C.
    widths: channels of each of the B blocks.
    dropout: rate after each block's convolutions (section 4: 0, 0.1, 0.2, 0.3, 0.4); empty: none.
    local_drop_path: probability that a join drops an input, in a step with local drop-path.
    global_drop_path: share of the steps that keep a single column instead.
    image_side: S, in pixels, a multiple of 2^B.

  Raises:
    ValueError: the shapes do not fit together; the message is one line.
  """

  num_classes: int = 100
  columns: int = 3
  widths: Sequence[int] = (64, 128, 256, 512, 512)
  dropout: Sequence[float] = ()
  local_drop_path: float = 0.15
  global_drop_path: float = 0.5
  image_side: int = 32
  channels: int = 3
  dtype: Any = jnp.float32
  axis_name: str | None = None

  rng_names = ('drop_path', 'dropout')
  initial_variables = staticmethod(initial_variables)

  def __post_init__(self):
    if self.columns < 2:
      raise ValueError(f'columns must be 2 or more, found {self.columns}: one alone is no fractal')
    if not self.widths:
      raise ValueError('widths must have one entry for each of 1 or more blocks, found ()')
    check_halvings(self.image_side, len(self.widths))
    if self.dropout and len(self.dropout) != len(self.widths):
      raise ValueError(
        f'dropout {tuple(self.dropout)} must have one rate for each of the {len(self.widths)} blocks, or none'
      )
    super().__post_init__()

  @property
  def num_exits(self) -> int:
    """C + 1."""
    return self.columns + 1

  @nn.compact
  def _evaluate(self, images, carry, exits, train):
    exits = tuple(sorted(set(exits)))
    if not exits:
      return {}, carry
    drop = None
    if train and self.has_rng('drop_path'):
      drop = draw(self.make_rng('drop_path'), self.columns, self.local_drop_path, self.global_drop_path)
    paths, first = self._block({exits: images.astype(self.dtype)}, 1, carry, drop, train)
    carry = carry | {column: x for column, outputs in first.items() for x in outputs.values()}
    for number in range(2, len(self.widths) + 1):
      paths, _ = self._block(_halved(paths), number, {}, drop, train)
    paths = _halved(paths)
    logits = Classifier(self.num_classes, name='exit')(jnp.concatenate(list(paths.values())))
    return {number: x for (number,), x in _separate(logits, paths).items()}, carry

  def _block(self, paths, block, known, drop, train):
    """Features after a block, and those that reach each column's first join; `known` holds some of these."""
    exits = sorted({number for key in paths for number in key})
    columns = range(1, self.columns + 1) if self.num_exits in exits else exits
    inputs = {column: self._of_column(paths, column) for column in columns}
    rate = self.dropout[block - 1] if self.dropout else 0.0
    first, rows = {}, 2 ** (self.columns - 1)
    for row in range(1, rows + 1):
      outputs = {}
      for column in columns:
        index, left = divmod(row, self._rows(column))
        if left:
          continue
        if column in known and row <= self._first_join(column):
          outputs[column] = dict.fromkeys(inputs[column], known[column])
        else:
          name = f'block_{block}_column_{column}_conv_{index}'
          layer = FractalLayer(self.widths[block - 1], rate, block == index == 1, self.axis_name, name=name)
          outputs[column] = layer(inputs[column], train)
        if row == self._first_join(column):
          first[column] = outputs[column]
      paths = self._join(outputs, drop, rows * block + row)
      inputs |= {column: self._of_column(paths, column) for column in outputs}
    return paths, first

  def _rows(self, column: int) -> int:
    """Rows that one convolution of the column spans."""
    return 2 ** (self.columns - column)

  def _first_join(self, column: int) -> int:
    """The row of the column's first join."""
    return max(self._rows(column), 2)

  def _of_column(self, paths: Paths, column: int) -> Paths:
    """The features that the column reads: those of its own exit and of the whole network."""
    kept = {tuple(number for number in key if number in (column, self.num_exits)): x for key, x in paths.items()}
    return {key: x for key, x in kept.items() if key}

  def _join(self, outputs: dict[int, Paths], drop: DropPath | None, join: int) -> Paths:
    """The columns' mean for the whole network, and each column unchanged for its own exit."""
    if len(outputs) == 1:
      return outputs[max(outputs)]
    joined: Paths = {(number,): x for paths in outputs.values() for key, x in paths.items() for number in key}
    whole = [x for paths in outputs.values() for key, x in paths.items() if self.num_exits in key]
    if whole and drop is not None:
      weights = join_weights(drop, join, tuple(outputs))
      total = sum(weight.astype(x.dtype) * x for weight, x in zip(weights, whole, strict=True))
      joined[(self.num_exits,)] = jnp.asarray(total)
    elif whole:
      joined[(self.num_exits,)] = jnp.asarray(sum(whole)) / len(whole)
    return joined


def from_fields(name: str, fields: dict[str, Any]) -> FractalNet:
  """Builds the network from a run's configuration fields."""
  return FractalNet(dropout=fields.pop('block_dropout'), **fields)


class FractalLayer(nn.Module):
  """Conv3x3-Dropout-BN-ReLU on all passes at once, in the order of the authors' network files."""

  features: int
  dropout: float
  reads_image: bool
  axis_name: str | None

  @nn.compact
  def __call__(self, paths: Paths, train: bool) -> Paths:
    x = jnp.concatenate(list(paths.values()))
    kernel = Kernel((3, 3, x.shape[-1], self.features), name='conv')()
    x = image_conv3x3(x, kernel) if self.reads_image else convolve(x, kernel)
    if train and self.dropout:
      key = self.make_rng('dropout')
      parts = enumerate(jnp.split(x, len(paths)))
      parts = [dropout(part, self.dropout, jax.random.fold_in(key, i), self.axis_name) for i, part in parts]
      x = jnp.concatenate(parts)
    return _separate(batch_norm_relu(x, train, self.axis_name, 'norm'), paths)


def _halved(paths):
  return {key: max_pool(x) for key, x in paths.items()}


def _separate(x, paths):
  parts = jnp.split(x, len(paths)) if len(paths) > 1 else [x]
  return dict(zip(paths, parts, strict=True))
