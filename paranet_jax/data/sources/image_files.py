"""Image files of the user's own as records, and what a folder of them holds besides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from absl import logging
from jaxtyping import Int32, UInt8
from ml_collections import ConfigDict
from numpy import ndarray

from paranet_jax.data.identity import Identities, identities
from paranet_jax.data.sources.corrupt import decode_or_skip
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError
from paranet_jax.portable.run import TO_SIDE, Scaling, left_out_line, printable


@dataclass
class Rest:
  """The files that are not images of the data set, see `run.Found`."""

  unreadable: list[tuple[str, str]] = field(default_factory=list)
  left_out: list[str] = field(default_factory=list)
  beside: list[str] = field(default_factory=list)  # In folders that are no split.


def image_folder(data_config: ConfigDict) -> Path:
  """The folder that `data_dir` names.

  Raises:
    UserError: there is none, or `on_corrupt` has a wrong value.
  """
  if data_config.on_corrupt not in ('refuse', 'skip'):
    raise UserError(f"expected 'refuse' or 'skip', found {data_config.on_corrupt!r}: set --config.data.on_corrupt=skip")
  if not data_config.data_dir:
    raise UserError('expected a folder of images, found none given: name it with --config.data.data_dir=...')
  root = absolute(data_config.data_dir)
  if not root.is_dir():
    raise UserError(f'expected a folder of images, found no folder {root}: name it with --config.data.data_dir=...')
  return root


def report(rest: Rest, on_corrupt: str) -> None:
  """Names what is left out; raises UserError for an image that cannot be read and must not be skipped."""
  for path, reason in rest.unreadable:
    if on_corrupt == 'refuse':
      raise UserError(
        f'expected a readable image, found {reason} at {path}: fix or remove it, or set --config.data.on_corrupt=skip'
      )
    logging.warning('Skipping %s: %s', printable(path), reason)
  if rest.left_out:
    logging.warning('%s', printable(left_out_line(rest.left_out)))


@dataclass(frozen=True)
class ImageFiles:
  """Records of image files (see `dataset.Records`), each identified by its bytes."""

  files: list[str]  # Paths would take many times the memory, in each worker.
  labels: Int32[ndarray, ' N']
  image_side: int
  channels: int
  skip_corrupt: bool
  scaling: Scaling = TO_SIDE

  def __len__(self) -> int:
    return len(self.files)

  def read(self, numbers: Sequence[int]) -> tuple[list[UInt8[ndarray, 'H W C'] | None], Int32[ndarray, ' n']]:
    """Decodes images."""
    return [self._decode(file, self._encoded(file)) for file in self._chosen(numbers)], self.labels[list(numbers)]

  def read_identified(
    self, numbers: Sequence[int]
  ) -> tuple[list[UInt8[ndarray, 'H W C'] | None], Int32[ndarray, ' n'], Identities]:
    """Decodes and identifies images."""
    files = self._chosen(numbers)
    contents = [self._encoded(file) for file in files]
    images = [self._decode(file, encoded) for file, encoded in zip(files, contents, strict=True)]
    return images, self.labels[list(numbers)], identities(content or b'' for content in contents)

  def _chosen(self, numbers: Sequence[int]) -> list[str]:
    return [self.files[number] for number in numbers]

  def _encoded(self, file: str) -> bytes | None:
    """None, with a warning, for a file that cannot be read and is skipped."""
    try:
      return Path(file).read_bytes()
    except MemoryError as error:  # Not skipped, which would be remembered: others may have taken the memory.
      raise UserError(
        f'expected images that fit the memory, found {file} of more bytes: remove it, or free memory'
      ) from error
    except OSError as error:
      if not self.skip_corrupt:
        raise UserError(
          f'expected a readable image, found {error.strerror} at {file}: change its permissions or remove it, or set '
          '--config.data.on_corrupt=skip'
        ) from error
      logging.warning('Skipping %s: %s', printable(file), error.strerror)
      return None

  def _decode(self, file: str, encoded: bytes | None) -> UInt8[ndarray, 'H W C'] | None:
    if encoded is None:
      return None
    return decode_or_skip(encoded, f'file {file}', self.image_side, self.channels, self.skip_corrupt, self.scaling)
