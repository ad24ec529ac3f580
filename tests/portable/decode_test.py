"""Image files of every format and mode, decoded to the size and the channels of a network."""

import io
import struct
import subprocess
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from odd_images import DAMAGED, ORIENTED, SAME, chunk, encoded, orientation, with_chunk
from PIL import Image

from paranet_jax.portable import run
from paranet_jax.portable.run import (
  TooManyPixels,
  TooMuchMemory,
  damage,
  decode_image,
  decoding_memory,
  read_image,
)

SQUARE = [[10, 20], [30, 40]]
WIDE = np.array([[0, 257], [32896, 65535]])  # 257 times NARROW.
NARROW = [[0, 1], [128, 255]]
FLOATS = np.array([[0, 0.25], [np.nan, 1]], np.float32)


def mode(name, pixels=SQUARE):
  return Image.fromarray(np.array(pixels, np.uint8)).convert(name)


def tiff(pixels, **options):
  return encoded(pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), 'TIFF', **options)


def animation(format):
  frames = [Image.new('RGB', (2, 2), (value,) * 3) for value in (50, 200)]
  options = {'lossless': True} if format == 'WEBP' else {}
  return encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)


BIG_ENDIAN = Image.frombytes('I;16B', (2, 2), WIDE.astype('>u2').tobytes())
TRANSPARENT = Image.merge('LA', (mode('L'), Image.fromarray(np.array([[0, 128], [254, 255]], np.uint8))))
ON_WHITE = [[255, 137], [31, 40]]
PALETTE = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), 'L').convert('P')
PALETTE.putpalette(sum(([gray] * 3 for gray in (10, 20, 30, 40)), []))
SIGNED = np.array([[-1000, 0], [1000, 3000]], np.int32)


def raw_tiff(pixels, tags):
  """An uncompressed TIFF of pixels [2, 2, samples] with more tags."""
  samples, bits = pixels.shape[2], 8 * pixels.itemsize
  tags = {256: 2, 257: 2, 259: 1, 262: 1, 277: samples, 278: 2, 279: pixels.nbytes} | tags
  place = 8 + 2 + 12 * (len(tags) + 2) + 4
  all_bits = struct.pack(f'<{samples}H', *[bits] * samples)
  entries = {tag: struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items()}
  entries[258] = struct.pack('<HHI', 258, 3, samples) + (all_bits + bytes(4))[:4]
  if samples > 2:
    entries[258] = struct.pack('<HHII', 258, 3, samples, place)
  entries[273] = struct.pack('<HHII', 273, 4, 1, place + len(all_bits))
  header = b'II*\0' + struct.pack('<IH', 8, len(entries))
  return header + b''.join(entries[tag] for tag in sorted(entries)) + bytes(4) + all_bits + pixels.tobytes()


# Name: (encoded file, channels, expected values of every channel).
GRAY = {
  'unchanged': (encoded(SQUARE), 1, SQUARE),
  'upside down by EXIF': (encoded(SQUARE, exif=orientation(3)), 1, [[40, 30], [20, 10]]),
  'rotated by EXIF': (encoded(SQUARE, exif=orientation(6)), 1, [[30, 10], [40, 20]]),
  'wide: center columns': (encoded([[0, 50, 100, 150]] * 2), 1, [[50, 100]] * 2),
  'tall: center row': (encoded([[0], [50], [100]]), 1, [[50]]),
  'gray to RGB': (encoded(SQUARE), 3, SQUARE),
  '1 bit': (encoded(mode('1', [[0, 255], [255, 0]])), 3, [[0, 255], [255, 0]]),
  'gray with transparency': (encoded(TRANSPARENT), 3, ON_WHITE),
  'RGBA to gray on white': (encoded(TRANSPARENT.convert('RGBA')), 1, ON_WHITE),
  'transparent gray': (encoded(SQUARE, transparency=10), 3, [[255, 20], [30, 40]]),
  'transparent 16-bit gray': (
    encoded(Image.fromarray(WIDE.astype(np.uint16)), transparency=257),
    1,
    [[0, 255], [128, 255]],
  ),
  'partly transparent palette': (encoded(PALETTE, transparency=bytes([0, 128, 254, 255])), 3, ON_WHITE),
  'CMYK': (tiff(mode('RGB').convert('CMYK')), 3, SQUARE),
  'YCbCr': (tiff(mode('RGB').convert('YCbCr')), 3, SQUARE),
  'CMYK to gray': (tiff(mode('RGB').convert('CMYK')), 1, SQUARE),
  'Lab to gray': (
    tiff(Image.merge('LAB', [Image.new('L', (2, 2), each) for each in (255, 128, 128)])),
    1,
    [[255] * 2] * 2,
  ),
  'RGBA to gray': (encoded(mode('RGBA')), 1, SQUARE),
  'GIF': (encoded(mode('L'), 'GIF', transparency=1), 3, SQUARE),
  'BMP': (encoded(mode('L'), 'BMP'), 3, SQUARE),
  'first frame of a GIF': (animation('GIF'), 3, [[50, 50]] * 2),
  'first frame of a WebP': (animation('WEBP'), 3, [[50, 50]] * 2),
  'first frame of a PNG': (animation('PNG'), 3, [[50, 50]] * 2),
  'first page of a TIFF': (animation('TIFF'), 3, [[50, 50]] * 2),
  '16-bit gray': (encoded(Image.fromarray(WIDE.astype(np.uint16))), 1, NARROW),
  '16-bit gray, big-endian, rotated': (tiff(BIG_ENDIAN, tiffinfo={0x0112: 6}), 1, [[128, 0], [255, 1]]),
  '32-bit gray in 16 bits': (tiff(WIDE.astype(np.int32)), 1, NARROW),
  '32-bit gray': (tiff(WIDE.astype(np.int32) * 30_000), 1, NARROW),
  'negative gray': (tiff(-WIDE.astype(np.int32)), 1, [[255, 254], [127, 0]]),
  'gray from -1000 to 3000': (tiff(SIGNED), 1, [[0, 64], [128, 255]]),
  '8 bits in 32': (tiff(np.array(SQUARE, np.int32)), 1, SQUARE),
  '12 bits in 16': (encoded(Image.fromarray((WIDE >> 4).astype(np.uint16))), 1, NARROW),
  '12 bits in floating point': (tiff((WIDE >> 4).astype(np.float32)), 1, NARROW),
  'dark, but of 12 bits by its tag': (
    tiff(np.array([[0, 16], [32, 64]], np.uint16), tiffinfo={281: 4095}),
    1,
    [[0, 1], [2, 4]],
  ),
  'brighter than its tag': (
    tiff(np.array([[0, 257], [514, 1023]], np.uint16), tiffinfo={281: 511}),
    1,
    [[0, 64], [128, 255]],
  ),
  'PGM of 12 bits': (b'P5 2 2 4095\n' + (WIDE >> 4).astype('>u2').tobytes(), 1, NARROW),
  'dark PGM of 16 bits': (b'P5 2 2 65535\n' + np.array([[0, 257], [514, 771]], '>u2').tobytes(), 1, [[0, 1], [2, 3]]),
  '16 bits, white is zero': (
    tiff(Image.fromarray(WIDE.astype(np.uint16)), tiffinfo={262: 0}),
    1,
    [[255, 254], [127, 0]],
  ),
  'first frame of an MPO': (
    encoded(Image.new('L', (16, 16), 50), 'MPO', save_all=True, append_images=[Image.new('L', (16, 16), 200)]),
    3,
    [[50] * 2] * 2,
  ),
  'progressive': (encoded(Image.new('L', (16, 16), 50), 'JPEG', progressive=True), 3, [[50, 50]] * 2),
  'floating point to 1': (tiff(FLOATS), 1, [[0, 64], [0, 255]]),
  'floating point to 255': (tiff(np.float32(SQUARE)), 1, SQUARE),
  'floating point that overshoots 1': (tiff(np.array([[0, 0.26], [0.52, 1.04]], np.float32)), 1, [[0, 64], [128, 255]]),
  'floating point that overshoots 255': (tiff(np.array([[0, 65], [130, 260]], np.float32)), 1, [[0, 64], [128, 255]]),
  'floating point to 3': (tiff(np.array([[0, 0.75], [1.5, 3]], np.float32)), 1, [[0, 64], [128, 255]]),
  '16 bits, white is zero, rotated': (
    tiff(Image.fromarray(WIDE.astype(np.uint16)), tiffinfo={262: 0, 0x0112: 6}),
    1,
    [[127, 255], [0, 254]],
  ),
  '12 bits by a tag, rotated': (
    tiff(np.array([[0, 16], [32, 64]], np.uint16), tiffinfo={281: 4095, 0x0112: 6}),
    1,
    [[2, 0], [4, 1]],
  ),
  'signed 8-bit gray': (raw_tiff(np.array([[[-128], [-127]], [[0], [127]]], np.int8), {339: 2}), 1, NARROW),
  '32-bit gray, unsigned by default': (raw_tiff((WIDE[..., None] * 65537).astype('<u4'), {}), 1, NARROW),
  'gray with premultiplied alpha': (
    raw_tiff(np.array([[[0, 0], [64, 128]], [[100, 255], [255, 255]]], np.uint8), {338: 1}),
    1,
    [[255, 191], [100, 255]],
  ),
  'PGM to 3': (b'P5 2 2 3\n\0\1\2\3', 1, [[0, 85], [170, 255]]),
  'PPM of 10 bits': (
    b'P6 2 2 1023\n' + np.repeat(np.array([0, 4, 514, 1023], '>u2'), 3).tobytes(),
    3,
    [[0, 1], [128, 255]],
  ),
}


@pytest.mark.parametrize(('file', 'channels', 'expected'), GRAY.values(), ids=GRAY)
def test_gray(file, channels, expected):
  image = decode_image(file, len(expected), channels)
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, np.repeat(np.array(expected)[:, :, None], channels, axis=2))


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_orientations(format):
  pixels = np.kron(SQUARE, np.full((8, 8), 6)).astype(np.uint8)
  for value, shown in ORIENTED.items():
    file = encoded(pixels, format, exif=orientation(value), **({'lossless': True} if format == 'WEBP' else {}))
    np.testing.assert_allclose(decode_image(file, 16, 1)[..., 0].astype(int), shown(pixels), atol=1, err_msg=str(value))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('case', DAMAGED)
def test_damaged_metadata(case):
  damaged, whole = DAMAGED[case]
  np.testing.assert_array_equal(decode_image(damaged, 16, 3), decode_image(whole, 16, 3))


def test_damaged_tiff_tags():
  whole = encoded(SQUARE, 'TIFF', dpi=(72, 72), tiffinfo={0x0112: 6})
  assert b'\x1a\x01\x05\x00' in whole
  damaged = whole.replace(b'\x1a\x01\x05\x00', b'\x1a\x01\x0b\x00')  # A resolution of floating point, of 8 bytes.
  np.testing.assert_array_equal(decode_image(damaged, 2, 1)[..., 0], [[30, 10], [40, 20]])


@pytest.mark.parametrize(
  'hostile',
  [
    encoded(SQUARE)[:33] + b'\0\x08\0\0IDAT' * 2**17,
    b'\xff\xd8' + b'\xff\xe1\0\x02' * 2**18,
    b'RIFF\0\0\x10\0WEBP' + b'ALPH\0\x08\0\0' * 2**17,
    b'RIFF\0\0\x10\0WEBP' + b'XMP \0\0\0\0' * 2**17,
  ],
)
def test_the_search_behind_damage_is_bounded(hostile, monkeypatch):
  unpacked = []
  monkeypatch.setattr(run, 'struct', SimpleNamespace(**vars(struct)))
  monkeypatch.setattr(run.struct, 'unpack_from', lambda *given: unpacked.append(1) or struct.unpack_from(*given))
  without = run._without_metadata(hostile)
  assert len(unpacked) <= 10_002 and len(without) <= len(hostile)


LENGTH = b'\xff\xd8\xff\xe1\xff\xff'  # Of a JPEG's first segment, longer than the file.
RIFF = b'RIFF\0\0\x10\0WEBP'
NO_PICTURE = {
  'no segments': (LENGTH + b'?' * 99, 'Truncated File Read'),
  'half the size of a picture': (LENGTH + b'\xff\xc0\0\x0b\x08', 'Truncated File Read'),
  'a size and then no segment': (LENGTH + b'\xff\xc0\0\x0b\x08\0\x08\0\x08' + b'?' * 99, 'Truncated File Read'),
  'segments without end': (LENGTH + b'\xff\xdd\0\x02' * 200, 'Truncated File Read'),
  'half of the pixels': (RIFF + b'VP8 \xff\xff\0\0' + b'?' * 99, 'could not create decoder object'),
  'a profile without pixels': (
    RIFF + b'ICCP\xff\xff\0\0' + b'?' * 99,
    f'not an image in a known format ({", ".join(run.FORMATS)})',
  ),
}


@pytest.mark.parametrize('case', NO_PICTURE)
def test_damage_that_leaves_no_picture(tmp_path, case):
  content, message = NO_PICTURE[case]
  (tmp_path / 'a').write_bytes(content)
  assert read_image(tmp_path / 'a', 8, 3) == message


def test_12_bit_tiffs():
  rows = b'\x00\x0f\xff\x33\x36\x66'  # 0 and 4095; 819 and 1638, a fifth and two fifths of it.
  tags = {256: 2, 257: 2, 258: 12, 259: 1, 262: 1, 277: 1, 278: 2, 279: len(rows)}
  entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in sorted((tags | {273: 200}).items()))
  file = (b'II*\0' + struct.pack('<IH', 8, len(tags) + 1) + entries + bytes(4)).ljust(200, b'\0') + rows
  assert decode_image(file, 2, 1)[..., 0].tolist() == [[0, 255], [51, 102]]
  # Dark pixels do not become white.
  assert decode_image(file[:200] + b'\0\0\x10' * 2, 2, 1).max() == 1


def test_an_orientation_that_cannot_be_read():
  whole = encoded(SQUARE)
  damaged = whole[:-12] + chunk(b'eXIf', b'no header') + whole[-12:]
  np.testing.assert_array_equal(decode_image(damaged, 2, 1), decode_image(whole, 2, 1))


def test_a_damaged_tiff_prints_nothing(capfd):
  file = bytearray(encoded(np.random.RandomState(0).randint(0, 256, (64, 64, 3)), 'TIFF', compression='tiff_lzw'))
  file[8:100:9] = bytes(byte ^ 0x11 for byte in file[8:100:9])
  with pytest.raises(OSError, match='decoder error -2'):
    decode_image(bytes(file), 8, 3)
  assert capfd.readouterr() == ('', '')


def test_a_file_of_another_format_is_not_read_to_its_end():
  file = io.BytesIO(b'text' + bytes(10**6))
  with pytest.raises(OSError, match='cannot identify'):
    decode_image(file, 8, 3)
  assert file.tell() == 4


def test_what_is_transparent_does_not_matter():
  found = [decode_image(file, 12, 3) for file in SAME.values()]
  for image in found:
    np.testing.assert_array_equal(image, found[0])
  assert found[0][0, 0].tolist() == [255] * 3 and found[0][6, 6].tolist() == [210, 40, 40]


def raw_png(size, bits, color, transparent, rows):
  """A PNG with a transparent color. color: 0 (gray) or 2 (RGB). rows: packed samples."""
  pixels = zlib.compress(b''.join(b'\0' + row for row in rows))
  header = struct.pack('>IIBBBBB', *size, bits, color, 0, 0, 0)
  parts = (b'IHDR', header), (b'tRNS', transparent), (b'IDAT', pixels), (b'IEND', b'')
  return encoded(SQUARE)[:8] + b''.join(chunk(*part) for part in parts)


def test_a_transparent_color_of_16_bits():
  pixels = np.array([[[0x1234, 0x5678, 0x9ABC], [0xFFFF, 0, 0]]], '>u2')
  file = raw_png((2, 1), 16, 2, pixels[0, 0].tobytes(), [pixels.tobytes()])
  assert decode_image(file, 1, 3).tolist() == [[[255, 128, 128]]]  # The mean of white and red.


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(
  ('bits', 'key', 'rows', 'expected'),
  [
    (1, 0, [b'\x40', b'\x80'], [[255, 255], [255, 255]]),
    (2, 1, [b'\x10', b'\xe0'], [[0, 255], [255, 170]]),
    (2, 0, [b'\x10', b'\xe0'], [[255, 85], [255, 170]]),
    (4, 5, [b'\x05', b'\x5f'], [[0, 255], [255, 255]]),
    (4, 85, [b'\x05', b'\x5e'], [[0, 85], [85, 238]]),  # None has such a value.
    (8, 5, [b'\x05\x55', b'\x00\xff'], [[255, 85], [0, 255]]),
  ],
)
def test_a_transparent_gray_of_few_bits(bits, key, rows, expected, channels):
  file = raw_png((2, 2), bits, 0, struct.pack('>H', key), rows)
  assert decode_image(file, 2, channels).tolist() == [[[gray] * channels for gray in row] for row in expected]


def test_a_transparent_color_without_pixels(tmp_path):
  file = raw_png((2, 2), 2, 0, struct.pack('>H', 1), [b'\x10', b'\xe0'])
  (tmp_path / 'a.png').write_bytes(file[: file.index(b'IDAT') - 4] + chunk(b'IEND', b''))
  assert read_image(str(tmp_path / 'a.png'), 2, 1) == 'cannot load this image'


def test_no_program_is_started(monkeypatch, tmp_path):
  monkeypatch.setattr(subprocess, 'Popen', None)  # Pillow calls Ghostscript for EPS.
  (tmp_path / 'a.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n')
  unknown = 'not an image in a known format (PNG, JPEG, GIF, BMP, PPM, WEBP, TIFF)'
  assert read_image(str(tmp_path / 'a.png'), 8, 3) == unknown


def test_too_many_pixels(tmp_path):
  (tmp_path / 'a.png').write_bytes(encoded(SQUARE))
  with pytest.raises(TooManyPixels, match=r'^expected at most 3 pixels, found 2 x 2$'):
    decode_image(encoded(SQUARE), 2, 1, max_pixels=3)
  assert read_image(str(tmp_path / 'a.png'), 2, 1, 3) == 'expected at most 3 pixels, found 2 x 2; set --max-pixels'
  assert decode_image(encoded(SQUARE), 2, 1, max_pixels=4).shape == (2, 2, 1)


def test_a_limit_above_that_of_pillow(monkeypatch):
  header = chunk(b'IHDR', b'\0\0\x50\0\0\0\x50\0\x08\0\0\0\0')  # 20,480 x 20,480 pixels, none of them there.
  file = with_chunk(encoded(SQUARE)[:8] + header, chunk(b'IEND', b''))
  with pytest.raises(TooManyPixels, match='expected at most 178,956,970 pixels, found many more'):
    decode_image(file, 2, 1)
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)  # To be restored.
  with pytest.raises(OSError) as error:
    decode_image(file, 2, 1, max_pixels=10**9)
  assert damage(error.value)


@pytest.mark.parametrize(
  ('file', 'bytes_a_pixel'),
  [
    (encoded(Image.new('L', (50, 40))), 1),
    (encoded(Image.new('RGB', (50, 40))), 4),
    (encoded(Image.new('RGB', (50, 40)), exif=orientation(6)), 8),
    (encoded(Image.new('RGBA', (50, 40))), 8),
    (encoded(Image.fromarray(np.zeros((40, 50), np.uint16))), 6),
    (encoded(Image.new('RGB', (50, 40)), 'JPEG', progressive=True), 4 + 6),
    (encoded(Image.new('RGB', (50, 40)), 'TIFF'), 8),
    (b'P6 50 40 100\n' + bytes(6000), 8),
    (b'P3 50 40 255\n' + b'7 ' * 6000, 36),
    (encoded(Image.new('RGB', (50, 40)), 'WEBP', exif=orientation(3)), 20),
  ],
)
def test_memory(tmp_path, file, bytes_a_pixel):
  memory = bytes_a_pixel * 2000
  assert decoding_memory(file) == memory
  assert decode_image(file, 2, 3, max_memory=memory).shape == (2, 2, 3)
  message = r'^expected an image that takes at most 0 MiB to decode, found 50 x 40 that takes 0 MiB'
  with pytest.raises(TooMuchMemory, match=f'{message}$'):
    decode_image(file, 2, 3, max_memory=memory - 1)
  (tmp_path / 'a.png').write_bytes(file)
  assert read_image(str(tmp_path / 'a.png'), 2, 3, max_memory=memory - 1).endswith(' takes 0 MiB; set --max-memory')


def test_a_small_tiff_of_a_huge_tile():
  tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 30_000, 323: 30_000, 324: 8, 325: 100}
  entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items())
  file = b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(100)
  with pytest.raises(TooManyPixels, match='^expected at most 178,956,970 pixels, found tiles or strips of 30000 x 3'):
    decode_image(file, 2, 1)
  with pytest.raises(TooMuchMemory, match='^expected an image .* found 16 x 16 that takes 858 MiB$'):
    decode_image(file, 2, 1, max_pixels=10**9, max_memory=2**29)


def test_a_jpeg_of_many_scans(tmp_path, monkeypatch):
  file = encoded(Image.new('RGB', (50, 40)), 'JPEG', progressive=True)
  scans = file.count(b'\xff\xda')
  assert 5 < scans < 20
  monkeypatch.setattr(run, 'MAX_SCANS', scans)
  assert decode_image(file, 2, 3).shape == (2, 2, 3)
  assert decode_image(file + b'\xff\xda' * 2**20, 2, 3).shape == (2, 2, 3)  # What follows is no scan.
  monkeypatch.setattr(run, 'MAX_SCANS', scans - 1)
  (tmp_path / 'a.jpg').write_bytes(file)
  message = f'expected a JPEG of at most {scans - 1} scans, found {scans}; encode it again'
  assert read_image(str(tmp_path / 'a.jpg'), 2, 3) == message


@pytest.mark.parametrize(
  ('file', 'kind'),
  [
    (b'P3\n2 1\n255\n1 2 3 4 5 6\n', 'plain PPM'),
    (
      b'BM' + struct.pack('<IHHI', 1084, 0, 0, 1078) + struct.pack('<IiiHHIIiiII', 40, 2, 1, 1, 8, 1, 6, 0, 0, 256, 0)
      + bytes(1024) + b'\2\0\0\0\0\1',
      'run-length encoded BMP',
    ),
  ],
)  # fmt: skip
def test_formats_that_pillow_decodes_slowly(monkeypatch, file, kind):
  monkeypatch.setattr(run, 'MAX_SLOW_PIXELS', 2)
  assert decode_image(file, 1, 3).shape == (1, 1, 3)
  monkeypatch.setattr(run, 'MAX_SLOW_PIXELS', 1)
  with pytest.raises(ValueError, match=f'^expected at most 1 pixels in {kind}, found 2 x 1; convert it to PNG$'):
    decode_image(file, 1, 3)


@pytest.mark.parametrize(('kind', 'channels'), [(2, 3), (4, 2), (6, 4)], ids=['RGB', 'gray and alpha', 'RGBA'])
def test_16_bit_colors_of_few_bits(tmp_path, kind, channels):
  def png(largest):
    pixel = struct.pack(f'>{channels}H', *[largest] * (channels - 1), largest if kind == 2 else 65535)
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 1, 1, 16, kind, 0, 0, 0))
    return encoded(SQUARE)[:8] + header + chunk(b'IDAT', zlib.compress(b'\0' + pixel)) + chunk(b'IEND', b'')

  assert decode_image(png(16384), 1, 3).tolist() == [[[64] * 3]]
  (tmp_path / 'a.png').write_bytes(png(16383))
  message = 'expected 16-bit colors that use the range up to 65,535, found at most 16,383; convert the image to 8 bits'
  assert read_image(str(tmp_path / 'a.png'), 1, 3) == message


def test_16_bit_tiffs_of_few_bits():
  pixels = np.full((2, 2, 3), 16383, np.uint16)
  assert decode_image(raw_tiff(pixels + 1, {262: 2}), 1, 3).tolist() == [[[64] * 3]]
  with pytest.raises(ValueError, match='^expected 16-bit colors .*, found at most 16,383'):
    decode_image(raw_tiff(pixels, {262: 2}), 1, 3)


@pytest.mark.parametrize(
  ('file', 'message'),
  [
    (b'P5 2 1 100\nd\x65', 'expected samples of at most 100, as the file declares, found 101'),
    (b'P6 2 1 1000\n' + bytes(11), 'image file is truncated'),
  ],
)
def test_samples_of_ppm_that_do_not_fit(file, message):
  with pytest.raises((ValueError, OSError), match=f'^{message}$'):
    decode_image(file, 1, 1)


SMALL_JPEG, SMALL_GIF = encoded(Image.new('L', (8, 8)), 'JPEG'), encoded(Image.new('L', (8, 8)), 'GIF')


@pytest.mark.parametrize(
  'file',
  [
    SMALL_JPEG[:2] + b'\xff\xe5\0\2' * 100 + SMALL_JPEG[2:],
    encoded(SQUARE)[:33] + chunk(b'tEXt', b'a\0b') * 100 + encoded(SQUARE)[33:],
    SMALL_GIF[: (at := SMALL_GIF.index(b','))] + b'!\xfe\1a\0' * 100 + SMALL_GIF[at:],
    b'P5\n#' + b'x' * 200 + b'\n1 1\n255\n\0',
  ],
  ids=['JPEG', 'PNG', 'GIF', 'PGM'],
)
def test_files_of_many_tiny_parts(monkeypatch, file):
  assert decode_image(file, 1, 1).shape == (1, 1, 1)
  monkeypatch.setattr(run, '_MOST_READS', 100)
  monkeypatch.setattr(run, '_without_metadata', None)  # They are not read again.
  with pytest.raises(ValueError, match='^expected an image of fewer and larger parts .* encode it again$'):
    decode_image(file, 1, 1)


def test_a_plain_ppm_of_many_comments():
  file = b'P2 1 1 255 ' + b'#a\n' * 1000 + b'7\n'
  assert decode_image(file, 1, 1).tolist() == [[[7]]]
  with pytest.raises(
    ValueError, match='^expected a plain PPM of at most 1000 comments, found 1,001; convert it to PNG$'
  ):
    decode_image(b'P2 1 1 255 #' + file[10:], 1, 1)


@pytest.mark.parametrize('kind', [273, 324])
def test_a_tiff_of_many_tiles(monkeypatch, kind):
  monkeypatch.setattr(run, '_MOST_TILES', 3)
  monkeypatch.setattr(Image, 'open', None)  # It would list them.
  for order in '<>':
    file = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(order + 'IHHHII', 8, 1, kind, 3, 4, 8) + bytes(8)
    with pytest.raises(ValueError, match='^expected a TIFF of at most 3 strips or tiles, found 4; save it again$'):
      decode_image(file, 1, 1)


def test_scans_across_the_parts_that_are_read():
  for before in range(2**20 - 5, 2**20 + 1):
    assert run._occurrences(run._SCAN, io.BytesIO(bytes(before) + b'\xff\xda\0\x08\1')) == 1


def test_orientation_after_the_pixels_counts_as_memory():
  first = encoded(Image.new('RGB', (50, 40)), exif=orientation(6))
  exif = first.index(b'eXIf') - 4
  end = exif + 12 + int.from_bytes(first[exif : exif + 4], 'big')
  late = first[:exif] + first[end:-12] + first[exif:end] + first[-12:]
  np.testing.assert_array_equal(decode_image(late, 40, 3), decode_image(first, 40, 3))
  with pytest.raises(TooMuchMemory):
    decode_image(late, 40, 3, max_memory=8 * 2000 - 1)


@pytest.mark.parametrize(('limit', 'scale'), [(8 * 1600, 1), (8 * 1600 - 1, 2), (8 * 400 - 1, 4), (1, 8)])
def test_huge_jpegs_are_decoded_smaller(monkeypatch, limit, scale):
  """Whatever the limit of the caller, so that all decode the same pixels."""
  pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
  file = encoded(pixels, 'JPEG', exif=orientation(3))
  monkeypatch.setattr(run, 'MAX_MEMORY', limit)
  reduced = Image.open(io.BytesIO(file))
  reduced.draft('RGB', (40 // scale, 40 // scale))
  expected = np.asarray(reduced.transpose(Image.Transpose.ROTATE_180).resize((5, 5), Image.Resampling.BILINEAR))
  for max_memory in (10**6, 10**9):
    np.testing.assert_array_equal(decode_image(file, 5, 3, max_memory=max_memory), expected)
  with pytest.raises(TooMuchMemory, match='expected an image .* found 40 x 40 that takes'):
    decode_image(file, 5, 3, max_memory=8 * 1600 // scale**2 - 1)
  with pytest.raises(TooMuchMemory):
    decode_image(encoded(pixels), 5, 3, max_memory=4 * 1600 - 1)


def test_large_images_are_composited_and_scaled_in_strips(monkeypatch):
  """As in one strip."""
  pixels = np.random.default_rng(0).integers(0, 4096, (90, 70, 4))
  files = [encoded(pixels % 256), encoded(Image.fromarray(pixels[..., 0].astype(np.uint16)))]
  whole = [decode_image(file, 70, 3) for file in files]
  monkeypatch.setattr(run, '_STRIP', 500)
  for file, expected in zip(files, whole, strict=True):
    np.testing.assert_array_equal(decode_image(file, 70, 3), expected)
  strips = run._strips(Image.new('L', (70, 20)))
  assert [(top, strip.size) for top, strip in strips] == [(0, (70, 7)), (7, (70, 7)), (14, (70, 6))]


def test_scaling_averages():
  image = decode_image(encoded(np.tile([[0, 0, 0, 0, 100, 100, 100, 100]], (8, 1))), 2, 1)
  # Triangle filter, four pixels each way from 2: of six weights that add to 3.5, 0.375 and 0.125 fall on 100.
  np.testing.assert_array_equal(image, np.array([[[14], [86]]] * 2))


COLOR = {
  'RGB': (encoded([[[255, 0, 7]]]), [255, 0, 7]),
  'RGBA': (encoded([[[255, 0, 7, 255]]]), [255, 0, 7]),
  'transparent RGBA is white': (encoded([[[255, 0, 7, 0]]]), [255, 255, 255]),
  'palette': (encoded(Image.fromarray(np.array([[[9, 8, 7]]], np.uint8)).convert('P', palette=1)), [9, 8, 7]),
  'cyan in CMYK': (encoded(Image.new('CMYK', (16, 16), (255, 0, 0, 0)), 'JPEG', quality=100), [0, 255, 255]),
  'luminance': (encoded([[[255, 0, 0]]]), [76]),  # 0.299 x 255
  'WebP': (encoded([[[255, 0, 7]]], 'WEBP', lossless=True), [255, 0, 7]),
}


@pytest.mark.parametrize(('file', 'expected'), COLOR.values(), ids=COLOR)
def test_color(file, expected):
  np.testing.assert_array_equal(decode_image(file, 1, len(expected)), [[expected]])


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'WEBP'])
def test_a_truncated_file(format):
  file = encoded(np.random.RandomState(0).randint(0, 256, (64, 64, 3)), format)
  for damaged in (file[: len(file) // 2], b'not an image'):
    with pytest.raises(Exception, match='.'):
      decode_image(damaged, 8, 3)


def test_an_open_file():
  np.testing.assert_array_equal(decode_image(io.BytesIO(encoded(SQUARE)), 2, 1)[..., 0], SQUARE)
