"""Draws web_page.png, the page of `export --web` with images of CIFAR-100, in a headless Chromium.

python -m paranet_jax.export --workdir=pretrained --out=BUNDLE --web
python docs/drawings/web_page.py BUNDLE DATA_DIR     # DATA_DIR: where tensorflow-datasets has prepared CIFAR-100
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / 'tests/helpers')]

import browser  # noqa: E402

from paranet_jax.base_config import base_config  # noqa: E402
from paranet_jax.data.sources.tfds import tfds_source  # noqa: E402

COUNT, SHOWN = 40, (1120, 760)


def draw(bundle: Path, data_dir: str, out: Path) -> None:
  """Takes the picture."""
  config = base_config()
  config.data.name, config.data.data_dir = 'cifar100', data_dir
  images, _ = tfds_source(config.data, 32, 3).records('test').read(range(COUNT))
  with tempfile.TemporaryDirectory() as folder, browser.served(bundle) as address, browser.opened() as page:
    files = [Path(folder) / f'photo {place}.png' for place in range(COUNT)]
    for file, image in zip(files, images, strict=True):
      Image.fromarray(image).save(file)
    page.resize(*SHOWN)
    page.open(f'{address}/')
    page.wait('document.getElementById("state").textContent === "Ready."')
    page.choose('#files', files)
    page.wait(f'document.querySelectorAll(".card[data-exit]:not([data-exit=\'\'])").length === {COUNT}')
    page.picture(out, whole=False)
  # Fewer colors: a quarter of the bytes, and no visible difference.
  Image.open(out).convert('RGB').quantize(128).save(out, optimize=True)


if __name__ == '__main__':
  draw(Path(sys.argv[1]), sys.argv[2], HERE / 'web_page.png')
