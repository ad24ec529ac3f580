"""A folder of the user's own images without labels: what exits learn to agree with the last one on."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from paranet_jax.data.cache import fingerprint
from paranet_jax.data.dataset import Source
from paranet_jax.data.scaling import scaling_of, scaling_settings
from paranet_jax.data.sources.image_files import ImageFiles, Rest, image_folder, report
from paranet_jax.host.errors import UserError
from paranet_jax.portable.run import SUFFIXES, find_images


def images_source(data_config: ConfigDict, image_side: int, channels: int) -> Source:
  """All images below `data_dir`, whatever their folders are called.

  `test_fraction` of them become the test split, chosen by their content. Which files are images, `run.find_images`
  decides; what is left out is counted and named in one line. Images are scaled and cropped, and corrupt ones are
  refused or skipped, as in `folder_source`. Every label is 0 and means nothing.

  Raises:
    UserError: the folder or its images are missing or do not fit.
  """
  root, on_corrupt = image_folder(data_config), data_config.on_corrupt
  found = find_images(str(root))
  rest = Rest(found.unreadable, found.left_out)
  report(rest, on_corrupt)
  if not found.images:
    raise UserError(
      f'expected images ({" ".join(SUFFIXES)}) in {root}, found none: name another folder with '
      '--config.data.data_dir=...'
    )
  count = round(data_config.test_fraction * len(found.images))
  if not 0 < count < len(found.images):
    raise UserError(
      f'expected a share that leaves an image to train on and one to test on, found {data_config.test_fraction} of '
      f'{len(found.images)} images in {root}: set --config.data.test_fraction=0.2, or add images'
    )
  labels = np.zeros(len(found.images), np.int32)
  return Source(
    name='images',
    version='',
    class_names=(),
    records=lambda _: ImageFiles(
      found.images, labels, image_side, channels, on_corrupt == 'skip', scaling_of(data_config)
    ),
    fingerprint=fingerprint(
      root, map(Path, found.images), data_config.test_fraction, on_corrupt, *scaling_settings(data_config)
    ),
    test_count=count,
    test_share=data_config.test_fraction,
    left_out=len(rest.left_out) + len(rest.unreadable),
  )
