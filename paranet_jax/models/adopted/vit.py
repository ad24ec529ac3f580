"""Vision transformers with a class token (Dosovitskiy et al. 2021; Touvron et al. 2021), with timm's names.

`vit_b_16` is the network of `vit_base_patch16_224` with torchvision's names.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from paranet_jax.models.adopted.architecture import Architecture, Mode, Parts, Preprocessing, Stage
from paranet_jax.models.adopted.layers import Conv, LayerNorm, Linear, gelu, token_init
from paranet_jax.models.adopted.tensors import ROOT
from paranet_jax.models.layers.dense_block import product

PATCH, HEAD_WIDTH = 16, 64
"""Side of a patch in pixels, and channels of an attention head."""


class Names(NamedTuple):
  """What modules and tensors are called."""

  patches: str
  token: str
  positions: str
  blocks: str
  norm1: str
  qkv: tuple[str, str]  # Weight and bias.
  projection: str
  norm2: str
  mlp: tuple[str, str]
  norm: str
  head: str


TIMM = Names(
  *('patch_embed.proj', 'cls_token', 'pos_embed', 'blocks.{}', 'norm1', ('attn.qkv.weight', 'attn.qkv.bias')),
  *('attn.proj', 'norm2', ('mlp.fc1', 'mlp.fc2'), 'norm', 'head'),
)
TORCHVISION = Names(
  *('conv_proj', 'class_token', 'encoder.pos_embedding', 'encoder.layers.encoder_layer_{}', 'ln_1'),
  *(('self_attention.in_proj_weight', 'self_attention.in_proj_bias'), 'self_attention.out_proj', 'ln_2'),
  *(('mlp.0', 'mlp.3'), 'encoder.ln', 'heads.head'),
)

_OLD = ((r'\.mlp\.linear_1\.', '.mlp.0.'), (r'\.mlp\.linear_2\.', '.mlp.3.'))
"""In torchvision's files, which are older than its names."""

_AUGREG = Preprocessing(224, 248, 'bicubic', (0.5,) * 3, (0.5,) * 3)
_NETWORKS = {
  'vit_small_patch16_224': (384, TIMM, _AUGREG),
  'vit_base_patch16_224': (768, TIMM, _AUGREG),
  'deit_tiny_patch16_224': (192, TIMM, Preprocessing(224, 248, 'bicubic')),
  'vit_b_16': (768, TORCHVISION, Preprocessing()),
}
"""Channels, names, and the preprocessing of the usual weights. All have 12 blocks."""


class Embedding(nn.Module):
  """A token for each patch, after the class token; positions are added."""

  width: int
  names: Names

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W C']) -> Float[Array, 'B N width']:
    patches = Conv(self.width, PATCH, PATCH, padding=0, bias=True, name=self.names.patches)(images)
    batch, rows, columns, _ = patches.shape
    tokens = patches.reshape(batch, rows * columns, self.width)
    first = self.param(self.names.token, token_init, (1, 1, self.width)).astype(tokens.dtype)
    tokens = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, self.width)), tokens], axis=1)
    return tokens + self.param(self.names.positions, token_init, (1, *tokens.shape[1:])).astype(tokens.dtype)


class Block(nn.Module):
  """Self-attention, then a perceptron with GELU, each after a norm and added to its input."""

  names: Names

  @nn.compact
  def __call__(self, x: Float[Array, 'B N C']) -> Float[Array, 'B N C']:
    names, width = self.names, x.shape[-1]
    x = x + Linear(width, name=names.projection)(self._attention(LayerNorm(name=names.norm1)(x)))
    y = gelu(Linear(4 * width, name=names.mlp[0])(LayerNorm(name=names.norm2)(x)))
    return x + Linear(width, name=names.mlp[1])(y)

  def _attention(self, x):
    batch, length, width = x.shape
    names = self.names.qkv
    weight = self.param(names[0], token_init, (3 * width, width)).astype(x.dtype)
    bias = self.param(names[1], nn.initializers.zeros, (3 * width,)).astype(x.dtype)
    qkv = (product(x, weight.T) + bias).reshape(batch, length, 3, width // HEAD_WIDTH, HEAD_WIDTH)
    query, key, value = (qkv[:, :, part] for part in range(3))
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key).astype(jnp.float32) / HEAD_WIDTH**0.5
    weights = jax.nn.softmax(scores).astype(x.dtype)
    return jnp.einsum('bhqk,bkhd->bqhd', weights, value).reshape(batch, length, width)


def architecture(name: str) -> Architecture:
  """A network of timm, or `vit_b_16`."""
  width, names, preprocessing = _NETWORKS[name]
  renames = _OLD if names is TORCHVISION else ()
  return Architecture(
    name,
    lambda classes: parts(12, width, names, classes),
    preprocessing,
    head='class_token',
    patch=PATCH,
    renames=renames,
  )


def parts(depth: int, width: int, names: Names, num_classes: int) -> Parts:
  """A network of this many blocks and channels."""

  def stem(x: Array, mode: Mode) -> Array:
    return Embedding(width, names, name=ROOT)(x)

  def block(place: str) -> tuple[str, Stage]:
    return place, lambda x, mode: Block(names, name=place)(x)

  def classifier(x: Array, mode: Mode) -> Array:
    return Linear(num_classes, name=names.head)(LayerNorm(name=names.norm)(x[:, 0]))

  blocks = [block(names.blocks.format(number)) for number in range(depth)]
  return Parts(((names.patches.split('.')[0], stem), *blocks), classifier)
