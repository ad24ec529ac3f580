"""Data sets of tensorflow-datasets in array_record form, without TensorFlow. The only file that knows tfds."""

import contextlib
import io
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.resource import get_dl_fname

from paranet_jax.data.cache import fingerprint
from paranet_jax.data.dataset import Source
from paranet_jax.data.decode import decode_image
from paranet_jax.data.sources.cifar_archive import read_label_names, read_records
from paranet_jax.host.errors import UserError

_PREPARABLE = ('cifar10', 'cifar100')  # The others' own code needs TensorFlow to prepare them.
_CHUNK = 1000  # Examples read at a time: twice as fast as one by one.
_HOST_TIMEOUT = 3.0  # Seconds; tfds by itself would retry for minutes.


def dataset_names() -> list[str]:
  """The names tfds knows by its own code."""
  return tfds.list_builders(with_community_datasets=False)


def tfds_source(name: str, data_dir: str, image_side: int, channels: int) -> Source | None:
  """An image classification data set prepared in `data_dir`, or None if tfds does not know the name.

  CIFAR-10 and CIFAR-100 are downloaded and prepared there first if need be. The test split is 'test', or 'validation'
  where there is no 'test'.

  Args:
    data_dir: '' for tfds's own default, ~/tensorflow_datasets.

  Raises:
    UserError: the data set is not prepared, in another format, damaged, or not image classification.
  """
  builder = _open_builder(name, data_dir)
  if builder is None:
    return None
  if not _is_prepared(builder):
    _prepare(builder)
    builder = _open_builder(name, data_dir)
  _check_format(builder)
  keys = _feature_keys(builder)
  splits = {'train': 'train', 'test': 'test' if 'test' in builder.info.splits else 'validation'}
  if missing := set(splits.values()) - builder.info.splits.keys():
    raise UserError(
      f'expected the splits train and test (or validation) in {name}, found no {", ".join(sorted(missing))} '
      f'but {", ".join(builder.info.splits)}: choose another data set with --config.data.name=...'
    )

  def records(split: str) -> '_TfdsRecords':
    source = builder.as_data_source(splits[split], decoders={keys[0]: tfds.decode.SkipDecoding()})
    return _TfdsRecords(source, str(builder.data_dir), keys, image_side, channels)

  folder = Path(builder.data_dir)
  return Source(
    name=name,
    version=str(builder.version),
    class_names=tuple(builder.info.features[keys[1]].names),
    counts={split: builder.info.splits[stored].num_examples for split, stored in splits.items()},
    read=lambda split: _read(records(split)),
    records=records,
    fingerprint=fingerprint(folder, sorted(folder.iterdir())),
  )


def _open_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder | None:
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # Some data sets' modules print about a missing TensorFlow.
      return tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
  except tfds.core.DatasetNotFoundError:
    return None
  except Exception as error:  # Names that do not parse, unknown versions, damaged metadata: each its own exception.
    raise UserError(
      f'expected a data set that tensorflow-datasets can open, found {name!r} ({_one_line(error)}): see '
      f'--config.data.name=... and --config.data.data_dir=...'
    ) from error


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
  # is_prepared() logs a warning where the first condition fails.
  return (builder.data_path / 'dataset_info.json').exists() and builder.is_prepared()


def _check_format(builder: tfds.core.DatasetBuilder) -> None:
  formats = [file_format.value for file_format in builder.info.available_file_formats()]
  if 'array_record' in formats:
    return
  mend = 'choose another folder with --config.data.data_dir=... and it is prepared there'
  if builder.name not in _PREPARABLE:
    mend = _build_command(builder, 'OTHER_FOLDER')
  raise UserError(f'expected array_record files in {builder.data_dir}, found {", ".join(formats)}: {mend}')


def _build_command(builder: tfds.core.DatasetBuilder, data_dir: str) -> str:
  return (
    f'run `tfds build {builder.name} --file_format=array_record --data_dir={data_dir}` where TensorFlow is installed, '
    f'and name that folder with --config.data.data_dir=...'
  )


def _feature_keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
  """The names of the image and the label among the features."""
  features, keys = builder.info.features, builder.info.supervised_keys or ('image', 'label')
  found = [features[key] if isinstance(key, str) and key in features else None for key in keys]
  match found:
    case [tfds.features.Image(), tfds.features.ClassLabel()] if found[0].np_dtype != np.float32:
      return keys
  raise UserError(
    f'expected image classification (8 or 16 bit images and one class label each), found {_one_line(features)} in '
    f'{builder.name}: choose another data set with --config.data.name=...'
  )


def _read(records: '_TfdsRecords') -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for start in range(0, len(records), _CHUNK):
    images, labels = records.read(range(start, min(start + _CHUNK, len(records))))
    yield np.stack(images), labels


@dataclass(frozen=True)
class _TfdsRecords:
  source: Any
  folder: str
  keys: tuple[str, str]
  image_side: int
  channels: int

  def __len__(self) -> int:
    return len(self.source)

  def read(self, numbers: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    image_key, label_key = self.keys
    try:
      examples = self.source.__getitems__(list(numbers))
      images = [decode_image(example[image_key], self.image_side, self.channels) for example in examples]
    except (RuntimeError, OSError) as error:
      raise UserError(
        f'expected whole files in {self.folder}, found damage ({_one_line(error)}): remove that folder and prepare '
        f'the data set again'
      ) from error
    return images, np.array([example[label_key] for example in examples], np.int32)


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
  """Downloads (or takes from the manual folder) and prepares CIFAR-10 or CIFAR-100 where the builder looks for it.

  Raises:
    UserError: another data set; or host, archive or folder do not serve.
  """
  if builder.name not in _PREPARABLE:
    raise UserError(
      f'expected {builder.name} prepared in {builder.data_dir_root}, found nothing there: '
      f'{_build_command(builder, builder.data_dir_root)}'
    )
  archive_builder = _archive_builder(type(builder))(data_dir=builder.data_dir_root)
  _check_archive(archive_builder)
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  try:
    archive_builder.download_and_prepare(download_config=config, file_format='array_record')
  except NonMatchingChecksumError as error:
    reason = _one_line(str(error).partition('To debug')[0])
    raise UserError(f'expected the official archive, found another: {reason}: remove that file') from error
  except (OSError, tfds.download.DownloadError) as error:
    raise UserError(
      f'expected to prepare {builder.name} in {builder.data_dir_root}, found: {_one_line(error)}: choose another '
      f'folder with --config.data.data_dir=... or start again'
    ) from error
  if not _is_prepared(builder):  # tfds leaves a folder alone that is there, whatever it holds.
    raise UserError(f'expected {builder.name} or nothing in {builder.data_dir}, found other files: remove that folder')


def _check_archive(builder: tfds.core.DatasetBuilder) -> None:
  """Raises UserError at once if the archive is not on this machine and its host does not answer."""
  url, downloads = builder.archive_url, Path(builder.data_dir_root) / 'downloads'
  known = builder.url_infos[url]
  manual = downloads / 'manual' / known.filename
  if manual.exists() or any(downloads.rglob(get_dl_fname(url, known.checksum))) or _host_answers(url):
    return
  raise UserError(
    f'expected {builder.name} prepared in {builder.data_dir_root} or a network to download it, found neither '
    f'({urlsplit(url).hostname} does not answer): put {url} into {manual.parent}/ by hand, or name the folder that '
    f'holds the prepared data set with --config.data.data_dir=...'
  )


def _host_answers(url: str, timeout: float = _HOST_TIMEOUT) -> bool:
  answers = []

  def ask() -> None:
    try:
      answers.append(requests.head(url, timeout=timeout))
    except requests.RequestException:
      pass

  # In a thread, because looking up the host's name obeys no timeout.
  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  thread.join(timeout)
  return bool(answers)


def _archive_builder(parent: type[tfds.core.DatasetBuilder]) -> type[tfds.core.DatasetBuilder]:
  """tfds's own CIFAR builder, but reading the archive with the standard library where `parent` needs TensorFlow."""

  class ArchiveBuilder(parent, skip_registration=True):
    __module__ = parent.__module__  # Recorded in the prepared set, and where tfds finds the checksums.
    name = parent.name

    @property
    def archive_url(self) -> str:
      return self._cifar_info.url

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
      cifar = self._cifar_info
      archive = Path(dl_manager.download(cifar.url))
      for key, file in zip(cifar.label_keys, cifar.label_files, strict=True):
        self.info.features[key].names = read_label_names(archive, cifar.prefix + file)
      files = {'train': cifar.train_files, 'test': cifar.test_files}
      return {split: self._generate_examples(split, archive, names) for split, names in files.items()}

    def _generate_examples(self, split: str, archive: Path, files: list[str]) -> Iterator[tuple[int, dict]]:
      cifar = self._cifar_info
      records = read_records(archive, [cifar.prefix + file for file in files], len(cifar.label_keys))
      for index, (labels, image) in enumerate(records):
        yield index, {'id': f'{split}_{index:05d}', 'image': image, **dict(zip(cifar.label_keys, labels, strict=True))}

  return ArchiveBuilder


def _one_line(message: object) -> str:
  return ' '.join(str(message).split())
