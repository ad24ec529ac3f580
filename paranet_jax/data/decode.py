"""Encoded image -> uint8 [side, side, channels], by the same code in training, in prediction and in a bundle."""

from paranet_jax.portable.run import decode_image, fit_image

__all__ = ['decode_image', 'fit_image']
