"""Image files that are easy to get wrong: rotated, transparent, of other depths, with damaged metadata."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTED = {
  1: lambda pixels: pixels,
  2: lambda pixels: pixels[:, ::-1],
  3: lambda pixels: pixels[::-1, ::-1],
  4: lambda pixels: pixels[::-1],
  5: lambda pixels: pixels.T,
  6: lambda pixels: np.rot90(pixels, -1),
  7: lambda pixels: np.rot90(pixels, 2).T,
  8: lambda pixels: np.rot90(pixels),
}
"""By EXIF orientation: how gray pixels are shown."""


def encoded(pixels, format='PNG', **options):
  """The bytes of an image or of uint8 pixels."""
  image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels, np.uint8))
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def orientation(value):
  exif = Image.Exif()
  exif[0x0112] = value
  return exif


def chunk(kind, content):
  """A chunk of a PNG."""
  return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def with_chunk(png, added):
  """A PNG with one more chunk after its header."""
  return png[:33] + added + png[33:]


def with_exif(jpeg, *tags):
  """A JPEG with these EXIF tags: (number, type, count, the bytes of the value)."""
  entries, data, place = b'', b'', 8 + 2 + 12 * len(tags) + 4
  for number, kind, count, value in tags:
    stored = value.ljust(4, b'\0') if len(value) <= 4 else struct.pack('<I', place + len(data))
    entries += struct.pack('<HHI', number, kind, count) + stored
    data += value if len(value) > 4 else b''
  block = b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<H', len(tags)) + entries + bytes(4) + data
  return jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(block) + 2) + block + jpeg[2:]


def with_length(file, kind, change):
  """The same file, but for the length that is declared before a chunk of a PNG, or after the name of another one."""
  place = file.index(kind)
  place, form = (place - 4, '>I') if file.startswith(b'\x89PNG') else (place + len(kind), '>H')
  if file.startswith(b'RIFF'):
    form = '<I'
  (length,) = struct.unpack_from(form, file, place)
  return file[:place] + struct.pack(form, length + change) + file[place + struct.calcsize(form) :]


ROTATED = (0x0112, 3, 1, struct.pack('<H', 6))
_PICTURE = np.kron(np.random.RandomState(0).randint(0, 256, (3, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
_JPEG = encoded(_PICTURE, 'JPEG', quality=95)
_PNG = encoded(_PICTURE)
_TEXT = with_chunk(_PNG, chunk(b'tEXt', b'a\0b'))
_WEBP = encoded(_PICTURE, 'WEBP', lossless=True, exif=orientation(1))
_PROFILED = encoded(_PICTURE, 'WEBP', lossless=True, icc_profile=bytes(100))
_THUMBNAIL = _JPEG[:2] + b'\xff\xe1\x40\0' + encoded(_PICTURE[:8, :8], 'JPEG').ljust(0x3FFE, b'?') + _JPEG[2:]

DAMAGED = {  # (damaged file, the same without the damage)
  'EXIF of a PNG': (with_chunk(_PNG, chunk(b'eXIf', b'\0\x08\0\x02\x01\x12\0\x03')), _PNG),
  'EXIF of a WebP': (encoded(_PICTURE, 'WEBP', lossless=True, exif=b'no header'), _PNG),
  'checksum of a text': (with_chunk(_PNG, chunk(b'tEXt', b'a\0b')[:-1] + b'?'), _PNG),
  'checksum of EXIF': (with_chunk(_PNG, chunk(b'eXIf', b'II*\0')[:-1] + b'?'), _PNG),
  'resolution of a PNG': (with_chunk(_PNG, chunk(b'pHYs', b'\0')), _PNG),
  'a text after the pixels': (_PNG[:-12] + chunk(b'iTXt', b'a')[:-1] + b'?' + _PNG[-12:], _PNG),
  'width of floating point': (with_exif(_JPEG, ROTATED, (0x0100, 11, 1, struct.pack('<f', 3.5))), 'rotated'),
  'rational height': (with_exif(_JPEG, ROTATED, (0x0101, 10, 1, struct.pack('<ii', 2**31 - 1, 1))), 'rotated'),
  'resolution of 0 / 0': (with_exif(_JPEG, ROTATED, (0x011A, 5, 1, struct.pack('<II', 0, 0))), 'rotated'),
  **{f'length of a text {change:+}': (with_length(_TEXT, b'tEXt', change), _PNG) for change in (-1, 1, 9, 2**31)},
  **{
    f'length of {name} {change:+}': (with_length(file, marker, change), _JPEG)
    for name, file, marker in (('JFIF', _JPEG, b'\xff\xe0'), ('a thumbnail', _THUMBNAIL, b'\xff\xe1'))
    for change in (-3, 5, 90, 0x3000)
  },
  **{f'length of EXIF in WebP {change:+}': (with_length(_WEBP, b'EXIF', change), _PNG) for change in (-6, 8, 999)},
  **{
    f'length of a profile in WebP {change:+}': (with_length(_PROFILED, b'ICCP', change), _PNG) for change in (-6, 999)
  },
  'length of a WebP': (with_length(_WEBP, b'RIFF', 2000), _PNG),
  'profile of a JPEG': (_JPEG[:2] + b'\xff\xe2\0\x0aMPF\0MM\0*' + _JPEG[2:], _JPEG),
}
DAMAGED = {
  name: (damaged, with_exif(_JPEG, ROTATED) if whole == 'rotated' else whole)
  for name, (damaged, whole) in DAMAGED.items()
}


def _apple(hidden):
  """A red square on transparent pixels, whose hidden color is given."""
  pixels = np.full((24, 24, 4), (*hidden, 0), np.uint8)
  pixels[6:18, 6:18] = (210, 40, 40, 255)
  return Image.fromarray(pixels)


_TWO_COLORS = _apple((0, 0, 255)).convert('RGB').quantize(2)
SAME = {  # One picture: transparency hides all in which these files differ.
  'hidden white': encoded(_apple((255, 255, 255))),
  'hidden black': encoded(_apple((0, 0, 0))),
  'WebP': encoded(_apple((9, 200, 9)), 'WEBP', lossless=True),
  'GIF': encoded(_apple((255, 255, 0)), 'GIF'),
  'palette': encoded(_TWO_COLORS, transparency=_TWO_COLORS.getpixel((0, 0))),
  'TIFF': encoded(_apple((1, 2, 3)), 'TIFF'),
  'color key': encoded(_apple((1, 2, 3)).convert('RGB'), transparency=(1, 2, 3)),
}


def all_files():
  """Name by name, the bytes of every file above and of a few common kinds."""
  rng = np.random.RandomState(1)
  gray = np.kron(rng.randint(0, 256, (3, 4)), np.ones((4, 4))).astype(np.uint8)
  frames = [Image.fromarray(_PICTURE), Image.fromarray(255 - _PICTURE)]
  found = {f'damaged {name}': damaged for name, (damaged, _) in DAMAGED.items()}
  found |= {f'same {name}': file for name, file in SAME.items()}
  for format in ('JPEG', 'PNG', 'WEBP', 'TIFF'):
    found |= {f'{format} {value}': encoded(_PICTURE, format, exif=orientation(value)) for value in ORIENTED}
  return found | {
    'CMYK': encoded(Image.fromarray(_PICTURE).convert('CMYK'), 'JPEG'),
    'progressive': encoded(_PICTURE, 'JPEG', progressive=True),
    'palette': encoded(Image.fromarray(_PICTURE).quantize(8)),
    '1 bit': encoded(Image.fromarray(gray).convert('1')),
    '16 bits': encoded(Image.fromarray(gray.astype(np.uint16) * 257)),
    '12 of 16 bits': encoded(Image.fromarray((gray.astype(np.uint16) * 257) >> 4)),
    '32 bits': encoded(Image.fromarray(gray.astype(np.int32)), 'TIFF'),
    'MPO': encoded(frames[0], 'MPO', save_all=True, append_images=frames[1:]),
    'GIF': encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:]),
    'animated WebP': encoded(frames[0], 'WEBP', save_all=True, append_images=frames[1:]),
    'PPM': encoded(_PICTURE, 'PPM'),
  }
