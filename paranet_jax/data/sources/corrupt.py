"""What happens to an image that cannot be decoded, whatever its source."""

import numpy as np
from absl import logging
from jaxtyping import UInt8

from paranet_jax.host.errors import UserError
from paranet_jax.portable.run import TO_SIDE, Scaling, TooManyPixels, damage, decode_image, printable


def decode_or_skip(
  encoded: bytes, where: str, side: int, channels: int, skip: bool, scaling: Scaling = TO_SIDE
) -> UInt8[np.ndarray, 'H W C'] | None:
  """Decodes an image for training; None, with a warning, if it cannot be decoded and is skipped.

  Args:
    where: 'file ...' or 'record ... of ...', for the message.

  Raises:
    UserError: it cannot be decoded, or has too many pixels, and must not be skipped.
  """
  try:
    return decode_image(encoded, side, channels, scaling=scaling)
  except TooManyPixels as error:
    reason, fix = str(error), f'{error} in {where}: scale it down'
  except MemoryError as error:  # Not skipped, which would be remembered: others may have taken the memory.
    raise UserError(
      f'expected images that fit the memory, found {where} that needs more to be decoded: free memory, or scale it down'
    ) from error
  except Exception as error:  # Damaged bytes make Pillow raise nearly anything, not only OSError.
    reason = damage(error)
    fix = f'expected an image, found a corrupt {where} ({reason}): fix or remove it'
  if not skip:
    raise UserError(f'{fix}, or set --config.data.on_corrupt=skip')
  logging.warning('Skipping corrupt %s: %s', printable(where), reason)  # Also in a worker, whose log is its own.
  return None
