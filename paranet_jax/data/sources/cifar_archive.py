"""The official CIFAR-10 and CIFAR-100 archives, read from the tar file as they are.

Source: https://www.cs.toronto.edu/~kriz/cifar.html ("binary version"). A record is the label bytes (CIFAR-10: one;
CIFAR-100: coarse, fine) and 3,072 bytes of pixels, channel by channel.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

_SHAPE = (3, 32, 32)


def read_records(archive: Path, members: Sequence[str], num_labels: int) -> Iterator[tuple[list[int], bytes]]:
  """Yields (labels, image as PNG) of each record of the members, in order."""
  for member in members:
    records = np.frombuffer(_read_member(archive, member), np.uint8).reshape(-1, num_labels + np.prod(_SHAPE))
    for record in records:
      pixels = record[num_labels:].reshape(_SHAPE).transpose(1, 2, 0)
      encoded = io.BytesIO()
      Image.fromarray(np.ascontiguousarray(pixels)).save(encoded, 'PNG')
      yield record[:num_labels].tolist(), encoded.getvalue()


def read_label_names(archive: Path, member: str) -> list[str]:
  """The class names of a text file in the archive, one a line."""
  return _read_member(archive, member).decode().split()


def _read_member(archive: Path, member: str) -> bytes:
  with tarfile.open(archive, 'r|gz') as tar:  # As a stream: the archive is decompressed up to the member, once.
    for entry in tar:
      if entry.name == member:
        return tar.extractfile(entry).read()
  raise KeyError(f'{member} in {archive}')
