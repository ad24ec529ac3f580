"""How images are scaled, by the configuration."""

from ml_collections import ConfigDict

from paranet_jax.portable.run import TO_SIDE, Scaling


def scaling_of(data_config: ConfigDict) -> Scaling:
  """The scaling that `config.data` asks for."""
  return Scaling(data_config.get('short_side'), data_config.get('interpolation', TO_SIDE.interpolation))


def scaling_settings(data_config: ConfigDict) -> tuple[object, ...]:
  """What a cache of decoded images depends on: nothing where images are scaled as they always were."""
  scaling = scaling_of(data_config)
  return () if scaling == TO_SIDE else tuple(scaling)
