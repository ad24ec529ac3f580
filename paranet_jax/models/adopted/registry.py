"""The registry of architectures, by torchvision's and timm's names. It imports no network before one is asked for.

Another package's architecture is registered by `register_architecture`, or provided as an entry point:

    [project.entry-points."paranet_jax.architectures"]
    my_net = "my_package.my_net:architecture"
"""

import difflib
import pkgutil
from collections.abc import Callable
from typing import Any

from paranet_jax.host.errors import UserError
from paranet_jax.host.plugins import Registry
from paranet_jax.models.adopted.architecture import Architecture

Maker = str | Callable[[str], Architecture]
"""A function from the name to the architecture, or its 'module:function'."""

_GROUPS = {
  'cifar_resnet': [f'cifar_resnet{depth}' for depth in range(20, 111, 6)],
  'resnet': ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnext50_32x4d'],
  'efficientnet_lite': ['tf_efficientnet_lite0', 'efficientnet_lite0'],
  'mobilenet_v2': ['mobilenet_v2'],
  'vit': ['vit_small_patch16_224', 'vit_base_patch16_224', 'vit_b_16', 'deit_tiny_patch16_224'],
  'efficientnet': ['efficientnet_b0'],
  'mobilenet_v3': ['mobilenet_v3_large', 'mobilenet_v3_small'],
  'convnext': ['convnext_tiny'],
  'wide_resnet': ['wide_resnet28_10'],
}
"""File of this package, each with a function `architecture`, and the names in it."""

ARCHITECTURES: Registry[Maker] = Registry(
  'paranet_jax.architectures',
  'architecture',
  {name: f'{__package__}.{group}:architecture' for group, names in _GROUPS.items() for name in names},
)

architecture_names = ARCHITECTURES.names
"""Every architecture, without importing any."""


def find_architecture(name: str) -> Architecture:
  """The architecture with this name.

  Raises:
    UserError: there is none; the message has the nearest names.
  """
  maker = ARCHITECTURES.find(name)
  if maker is None:
    names = architecture_names()
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names
    raise UserError(
      f'expected an architecture ({", ".join(near)}, ...), found {name!r}; set --arch or --config.model.arch'
    )
  return (pkgutil.resolve_name(maker) if isinstance(maker, str) else maker)(name)


def place_of(name: str) -> str:
  """Where the code of a known architecture is, 'module:name'."""
  maker: Any = ARCHITECTURES.find(name)
  return maker if isinstance(maker, str) else f'{maker.__module__}:{getattr(maker, "__qualname__", "")}'


def register_architecture(name: str, maker: Maker) -> None:
  """Makes an architecture available to every command in this process.

  Raises:
    ValueError: another architecture has this name.
  """
  ARCHITECTURES.register(name, maker)
