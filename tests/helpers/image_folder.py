"""Folders of small images, and the configuration that reads them."""

from ml_collections import ConfigDict
from PIL import Image


def write(path, value, size=(4, 4)):
  """One image of a single grey value, width and height in pixels."""
  path.parent.mkdir(parents=True, exist_ok=True)
  options = {'lossless': True} if path.suffix.lower() == '.webp' else {}
  Image.new('RGB', size, (value,) * 3).save(path, **options)


def config_of(root, **changes):
  """The `data` section."""
  return ConfigDict(
    {
      'name': 'folder',
      'data_dir': str(root),
      'held_out': 0,
      'test_fraction': 0.25,
      'on_corrupt': 'refuse',
      'crop_padding': 0,
      'flip': False,
      'streaming': None,
      'workers': 0,
      **changes,
    }
  )


def spoil(path):
  """Cuts a file in half."""
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
