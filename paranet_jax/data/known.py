"""The registry of data sets: what is known about each by its name, before any image is read.

A data set of this package is one file in `sources/` and one entry of `DATASETS`; a prepared tensorflow-datasets name
that is not here works too. Another package's data set is registered by `register_source`, or found by its name in the
entry point group `paranet_jax.datasets`, which makes `--config.data.name=shapes` work in every command:

    [project.entry-points."paranet_jax.datasets"]
    shapes = "my_package.shapes:SHAPES"

with `SHAPES = KnownDataset(open_source=...)` in my_package/shapes.py. Worker processes of `--config.data.streaming`
unpickle its records, so their class must be importable there.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable

from ml_collections import ConfigDict

from paranet_jax.data.dataset import Source
from paranet_jax.host.plugins import Registry

OpenSource = Callable[[ConfigDict, int, int], Source | None]
"""Opens a data set, given `config.data`, the image side in pixels and 1 or 3 channels; None: its name is unknown."""


@dataclasses.dataclass(frozen=True)
class KnownDataset:
  """Facts about a data set; the defaults are those of a data set about which nothing is known.

  Attributes:
    open_source: a function that opens the data set, or its 'module:function'; None: tensorflow-datasets opens it.
    num_classes: None where the data has to be read first.
    counts: (training images, test images); None where the data has to be read first.
    mirrored: whether training images are mirrored unless the configuration says otherwise.
    padding_share: training images are padded by image_side // padding_share pixels, and cropped at random, unless the
      configuration says otherwise. 8 gives 4 pixels at 32, as for CIFAR in DenseNet's code.
    labeled: whether the label of an image means anything; otherwise only what needs none can be learned or measured.
    in_data_dir: whether `data.data_dir` says which images these are, not only where they are on this machine.
    license: for the model card.
  """

  open_source: OpenSource | str | None = None
  num_classes: int | None = None
  counts: tuple[int, int] | None = None
  mirrored: bool = True
  padding_share: int = 8
  labeled: bool = True
  in_data_dir: bool = False
  license: str = 'not known to the exporter; see the data set'

  def open(self, data_config: ConfigDict, image_side: int, channels: int) -> Source | None:
    """Finds the data set and checks it; None: its name is unknown.

    Raises:
      UserError: the data set is missing or does not fit.
    """
    found = self.open_source or 'paranet_jax.data.sources.tfds:tfds_source'
    if isinstance(found, str):  # Imported when it is needed: tensorflow-datasets takes a second.
      module, _, function = found.partition(':')
      found = getattr(importlib.import_module(module), function)
    return found(data_config, image_side, channels)


_OWN_IMAGES = "the exporter's own images; ask the provider of this bundle for the terms"
_CIFAR = 'Krizhevsky 2009; distributed for research without a stated license'
_CHARACTERS = KnownDataset(mirrored=False)  # A mirrored character is a different character, or none.

DATASETS = Registry(
  'paranet_jax.datasets',
  'data set',
  {
    'cifar100': KnownDataset(num_classes=100, counts=(50_000, 10_000), license=_CIFAR),
    'cifar10': KnownDataset(num_classes=10, counts=(50_000, 10_000), license=_CIFAR),
    'digits': KnownDataset(
      'paranet_jax.data.sources.digits:digits_source',
      num_classes=10,
      counts=(1437, 360),
      mirrored=False,
      padding_share=32,  # Of 0 to 4 pixels at side 32, 1 was best on held-out digits.
      license='Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998, CC BY 4.0',
    ),
    'folder': KnownDataset(
      'paranet_jax.data.sources.folder:folder_source',
      in_data_dir=True,
      license=_OWN_IMAGES,
    ),
    'images': KnownDataset(
      'paranet_jax.data.sources.images:images_source',
      labeled=False,
      in_data_dir=True,
      license=_OWN_IMAGES,
    ),
    'imagenet2012': KnownDataset(num_classes=1000, counts=(1_281_167, 50_000)),
    'binary_alpha_digits': _CHARACTERS,
    'emnist': _CHARACTERS,
    'kmnist': _CHARACTERS,
    'mnist': _CHARACTERS,
    'omniglot': _CHARACTERS,
    'svhn_cropped': _CHARACTERS,
  },
)


def register_source(name: str, known: KnownDataset) -> None:
  """Adds a data set, which `--config.data.name=NAME` then finds in this process.

  Raises:
    ValueError: another data set has this name.
  """
  DATASETS.register(name, known)


def known_dataset(name: str) -> KnownDataset:
  """What is known about a data set; a tfds name may have a /config and a :version."""
  base = re.split('[/:]', name)[0]
  known = DATASETS.find(base) or KnownDataset()
  return known if name == base else dataclasses.replace(known, open_source=None)


def registered_names() -> list[str]:
  """The data sets that can be opened without knowing tensorflow-datasets."""
  prepared = {name for name, known in DATASETS.known.items() if known.open_source is None}
  return ['cifar100', 'cifar10', *(name for name in DATASETS.names() if name not in prepared)]
