"""The heads of exits that are added to a trained network: features in, logits out."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from paranet_jax.host.errors import UserError
from paranet_jax.models.adopted.architecture import Mode
from paranet_jax.models.adopted.layers import BatchNorm, Conv, LayerNorm, Linear, pooled, relu
from paranet_jax.models.adopted.registry import find_architecture
from paranet_jax.models.layers.backend import PLAIN, SHAPES, backend, compiling_for
from paranet_jax.models.multi_exit import Logits

CONV_WIDTH = 128
"""Channels of the convolution of a head 'conv'."""
CONV_SIDE = 16
"""The largest side, in pixels, of the features that a head 'conv' reads; larger ones are averaged to it."""
LEAST_COPIES = 3
"""Blocks that a head 'blocks' has at least, if one of them changes the shape and as many follow."""
COPIED = 'blocks'
"""The module of a head whose parameters start as those of the network that have the same names."""
INTERMEDIATES = 'intermediates'
"""The collection in which a head 'blocks' leaves its last features, pooled, if that is mutable."""

_FIX = 'set --config.model.head'


class Head(nn.Module):
  """Base of heads. A subclass computes logits from what `read` leaves of the features."""

  num_classes: int

  @staticmethod
  def read(x: Any) -> Any:
    """What the parameters read of the features: as much or less; applied twice it changes nothing more."""
    return x

  def classify(self, x: Float[Array, 'B C']) -> Logits:
    """The linear layer at the end; call it inside a compact method."""
    return Linear(self.num_classes, name='classifier')(x.astype(jnp.float32))


class LinearHead(Head):
  """Pool-Linear."""

  @staticmethod
  def read(x: Float[Array, 'B *places C']) -> Float[Array, 'B *ones C']:
    """The mean over all places."""
    return jnp.expand_dims(pooled(x), tuple(range(1, x.ndim - 1))).astype(x.dtype)

  @nn.compact
  def __call__(self, x: Float[Array, 'B *places C'], mode: Mode) -> Logits:
    return self.classify(pooled(x))


class NormHead(Head):
  """BN-ReLU-Pool-Linear, the head of the paper."""

  @nn.compact
  def __call__(self, x: Float[Array, 'B *places C'], mode: Mode) -> Logits:
    return self.classify(pooled(relu(BatchNorm(name='norm')(x, mode))))


class ConvHead(Head):
  """Conv3x3-BN-ReLU-Pool-Linear, the convolution with stride 2."""

  @staticmethod
  def read(x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
    """The features, averaged over squares to a side of at most CONV_SIDE."""
    if x.ndim != 4:
      raise UserError(f"head 'conv' needs features of height and width, found tokens; {_FIX}")
    factor = -(-x.shape[1] // CONV_SIDE)
    if factor == 1:
      return x
    if backend() == PLAIN:
      return nn.avg_pool(x, window_shape=(factor, factor), strides=(factor, factor))  # jax2onnx takes only names.
    batch, height, width, channels = x.shape
    height, width = height // factor, width // factor
    x = x[:, : height * factor, : width * factor]
    return x.reshape(batch, height, factor, width, factor, channels).mean((2, 4))

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], mode: Mode) -> Logits:
    x = Conv(CONV_WIDTH, stride=2, name='conv')(self.read(x))
    return self.classify(pooled(relu(BatchNorm(name='norm')(x, mode))))


class ClassTokenHead(Head):
  """LayerNorm-Linear of the first token."""

  @staticmethod
  def read(x: Float[Array, 'B N C']) -> Float[Array, 'B 1 C']:
    """The first token."""
    if x.ndim != 3:
      raise UserError(f"head 'class_token' needs tokens, found features of height and width; {_FIX}")
    return x[:, :1]

  @nn.compact
  def __call__(self, x: Float[Array, 'B N C'], mode: Mode) -> Logits:
    return self.classify(LayerNorm(name='norm')(self.read(x)[:, 0]))


class BlocksHead(Head):
  """Later blocks of the network itself, those that change the features' shape and the last one, and its classifier.

  Without `copies`, those that follow the last change of the shape are added if there are fewer than LEAST_COPIES.

  They start as copies of the network's own (see `runs.init_from`), and then learn. The blocks that are left out keep
  the shape: in a residual network they refine what they read, and so the copies start near a solution.

  Attributes:
    arch: name of the architecture.
    after: number of the stage that the exit follows.
    copies: blocks of each later shape, if there are as many.
  """

  arch: str
  after: int
  copies: int | None = None

  @nn.compact
  def __call__(self, x: Any, mode: Mode) -> Logits:
    return OwnBlocks(self.num_classes, self.arch, self.after, self.copies, name=COPIED)(x, mode)


class OwnBlocks(nn.Module):
  """The blocks and the classifier of a `BlocksHead`, under their own names."""

  num_classes: int
  arch: str
  after: int
  copies: int | None

  @nn.compact
  def __call__(self, x: Any, mode: Mode) -> Logits:
    parts = find_architecture(self.arch).build(self.num_classes)
    for number in _needed_stages(self.arch, self.after, tuple(x.shape[1:]), self.copies):
      x = parts.stages[number][1](x, mode)
    if self.is_mutable_collection(INTERMEDIATES):
      self.sow(INTERMEDIATES, 'features', pooled(x))
    return parts.classifier(x, mode).astype(jnp.float32)


class _Stage(nn.Module):
  """One stage of an architecture, alone."""

  arch: str
  number: int

  @nn.compact
  def __call__(self, x: Any) -> Any:
    return find_architecture(self.arch).build(2).stages[self.number][1](x, Mode())


@functools.lru_cache(maxsize=256)
def _needed_stages(arch: str, after: int, shape: tuple[int, ...], copies: int | None) -> tuple[int, ...]:
  """Numbers, from 0, of the later stages that a head after stage `after` has copies of (see `BlocksHead`)."""
  last, changes = len(find_architecture(arch).places) - 1, []
  for number in range(after, last + 1):
    before, shape = shape, _shape_after(arch, number, shape)
    if shape != before:
      changes.append(number)
  needed = {*changes, last}
  if not changes:  # What the exit reads is nearly what the classifier does, and one is enough.
    return (last,)
  if copies is None:
    needed |= set(range(changes[-1] + 1, min(changes[-1] + LEAST_COPIES - len(changes), last)))
    return tuple(sorted(needed))
  ends = (*changes[1:], last + 1)
  for first, end in zip(changes, ends, strict=True):
    own = copies - (end == last + 1)  # The last block is one of those of the last shape.
    needed |= set(range(first, min(first + own, end)))
  return tuple(sorted(needed))


@functools.lru_cache(maxsize=1024)
def _shape_after(arch: str, number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of what a stage makes of features of this shape, both without the batch."""
  with compiling_for(SHAPES):
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    found, _ = jax.eval_shape(_Stage(arch, number, parent=None).init_with_output, jax.random.key(0), x)
  return found.shape[1:]


HEADS: dict[str, type[Head]] = {
  'linear': LinearHead,
  'bn_relu': NormHead,
  'conv': ConvHead,
  'class_token': ClassTokenHead,
  'blocks': BlocksHead,
}
"""The kinds of head, by the value of `model.head`."""
