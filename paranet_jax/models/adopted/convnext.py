"""ConvNeXt-Tiny (Liu et al. 2022) with torchvision's names; timm's, for the same network, are read too."""

import flax.linen as nn
from jax import Array
from jaxtyping import Float

from paranet_jax.models.adopted.architecture import Architecture, Mode, Parts, Preprocessing, Stage
from paranet_jax.models.adopted.layers import LAYER_SCALE, Conv, LayerNorm, Linear, gelu, pooled

STAGES = ((96, 3), (192, 3), (384, 9), (768, 3))
"""Channels and blocks of each stage."""

_OF_TIMM = (
  (r'^stem\.', 'features.0.'),
  *((rf'^stages\.{stage}\.blocks\.', f'features.{2 * stage + 1}.') for stage in range(4)),
  *((rf'^stages\.{stage}\.downsample\.', f'features.{2 * stage}.') for stage in range(4)),
  (r'\.conv_dw\.', '.block.0.'),
  (r'^(features\.\d\.\d+)\.norm\.', r'\1.block.2.'),
  (r'\.mlp\.fc1\.', '.block.3.'),
  (r'\.mlp\.fc2\.', '.block.5.'),
  (r'\.gamma$', '.layer_scale'),
  (r'^head\.norm\.', 'classifier.0.'),
  (r'^head\.fc\.', 'classifier.2.'),
)


class Block(nn.Module):
  """x + scale * (Depthwise7x7-LayerNorm-Linear-GELU-Linear)."""

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    width = x.shape[-1]
    y = LayerNorm(name='block.2')(Conv(width, 7, groups=width, bias=True, name='block.0')(x))
    y = Linear(width, name='block.5')(gelu(Linear(4 * width, name='block.3')(y)))
    scale = self.param('layer_scale', nn.initializers.constant(LAYER_SCALE), (width, 1, 1))
    return x + scale[:, 0, 0].astype(x.dtype) * y


def architecture(name: str) -> Architecture:
  """`convnext_tiny`."""
  return Architecture(
    name,
    lambda classes: parts(STAGES, classes),
    Preprocessing(resize=236),
    least_side=4 * 2 ** (len(STAGES) - 1),  # Halving without padding drops what is left over.
    renames=_OF_TIMM,
  )


def parts(stages: tuple[tuple[int, int], ...], num_classes: int) -> Parts:
  """A network of these stages."""

  def stem(x: Array, mode: Mode) -> Array:
    x = Conv(stages[0][0], 4, 4, padding=0, bias=True, name='features.0.0')(x)
    return LayerNorm(name='features.0.1')(x)

  def halving(place: str, width: int) -> tuple[str, Stage]:
    def halve(x: Array, mode: Mode) -> Array:
      x = LayerNorm(name=f'{place}.0')(x)
      return Conv(width, 2, 2, padding=0, bias=True, name=f'{place}.1')(x)

    return place, halve

  def block(place: str) -> tuple[str, Stage]:
    return place, lambda x, mode: Block(name=place)(x)

  def classifier(x: Array, mode: Mode) -> Array:
    return Linear(num_classes, name='classifier.2')(LayerNorm(name='classifier.0')(pooled(x)))

  found: list[tuple[str, Stage]] = [('features.0', stem)]
  for group, (width, size) in enumerate(stages):
    if group:
      found.append(halving(f'features.{2 * group}', width))
    found += [block(f'features.{2 * group + 1}.{number}') for number in range(size)]
  return Parts(tuple(found), classifier)
