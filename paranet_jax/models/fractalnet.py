"""FractalNet (Larsson et al. 2017) with an exit for each column run alone, shallow to deep, and one for the whole net.

A block of C columns has 2^(C-1) rows. Column c, of 2^(c-1) convolutions, ends one every 2^(C-c) rows; the columns that
end one in the same row are joined by their mean, which all of them read next. B blocks make B 2^(C-1) layers: 20 with
B = 5, C = 3 and 40 with C = 4.

Column c alone is the plain network of its own convolutions, with the same weights, statistics and classifier (section
4.3). What it shares with the whole net is what comes before its first join, in the first block: that is computed once.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from paranet_jax.models.layers.conv import Classifier, batch_norm_relu, convolve
from paranet_jax.models.layers.dense import Kernel, max_pool
from paranet_jax.models.layers.dense_block import image_conv3x3
from paranet_jax.models.layers.drop_path import DropPath, draw, join_weights
from paranet_jax.models.layers.dropout import dropout
from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.multi_exit import MultiExit

Paths = dict[tuple[int, ...], Array]
"""Features [B, H, W, C] by the exits that they are of: one entry for several as long as they are the same."""

Carry = dict[int, Array]
"""Of each column in the first block, the features [B, S, S, widths[0]] that reach its first join."""


class FractalNet(MultiExit):
  """A FractalNet. Exits 1..C are the columns alone, exit C + 1 is the whole network.

  In training, the exits that are trained together share a convolution's batch statistics: they are those of all the
  passes through it, as its running statistics serve all of them. A random key `rngs={'drop_path': key}` turns drop-path
  on; it acts on the whole network only. Dropout needs a key `dropout`. Both keys must be the same on every device.

  Attributes:
    num_classes: width of every exit.
    columns: C.
    widths: channels of each block; B of them.
    dropout: rate of each block, after its convolutions (section 4: 0, 0.1, 0.2, 0.3, 0.4); empty: none.
    local_drop_path: rate at which a join drops an input, in a step of local drop-path.
    global_drop_path: share of the steps that keep one column instead.
    image_side: S, pixels, a multiple of 2^B.
    dtype: of the computation; parameters, statistics and logits are float32.
    axis_name: device axis over which batch statistics are shared in training.

  Raises:
    ValueError: the shapes do not fit, in one line.
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
    self._check()
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
    """Features after a block, and of each column what reaches its first join; `known` is that, where it is there."""
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
    """The row in which the column is first joined."""
    return max(self._rows(column), 2)

  def _of_column(self, paths: Paths, column: int) -> Paths:
    """Of these features, what the column reads: those of its own exit and of the whole network."""
    kept = {tuple(number for number in key if number in (column, self.num_exits)): x for key, x in paths.items()}
    return {key: x for key, x in kept.items() if key}

  def _join(self, outputs: dict[int, Paths], drop: DropPath | None, join: int) -> Paths:
    """The mean of the columns for the whole network; for a column's own exit, the column."""
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

  def _check(self) -> None:
    times = len(self.widths)
    if self.columns < 2:
      raise ValueError(f'columns {self.columns} must be 2 or more: one alone is no fractal')
    if self.image_side < 1 or self.image_side % 2**times:
      raise ValueError(f'image_side {self.image_side} cannot be halved {times} times, once a block')
    if self.dropout and len(self.dropout) != times:
      raise ValueError(f'dropout {tuple(self.dropout)} must have one rate for each of the {times} blocks, or none')


def from_fields(name: str, fields: dict[str, Any]) -> FractalNet:
  """The network of a run's configuration fields."""
  return FractalNet(dropout=fields.pop('block_dropout'), **fields)


class FractalLayer(nn.Module):
  """Conv3x3-Dropout-BN-ReLU of all the passes at once: the order of the authors' own network files."""

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
