"""Data sets prepared by tensorflow-datasets as array_record files, without TensorFlow. The only file that imports tfds.

CIFAR-10 and CIFAR-100 are also prepared here, from the official archives ("binary version") of
https://www.cs.toronto.edu/~kriz/cifar.html. A record there is the label bytes (CIFAR-10: one; CIFAR-100: coarse, fine)
and 3,072 bytes of pixels, channel by channel.
"""

import contextlib
import fcntl
import glob
import io
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests
import tensorflow_datasets as tfds
from jaxtyping import Int32, UInt8
from ml_collections import ConfigDict
from PIL import Image
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.resource import get_dl_fname

from paranet_jax.data.cache import fingerprint
from paranet_jax.data.dataset import Source
from paranet_jax.data.identity import Identities, identities
from paranet_jax.data.scaling import scaling_of, scaling_settings
from paranet_jax.data.sources.corrupt import decode_or_skip
from paranet_jax.host.arguments import absolute, check_utf8
from paranet_jax.host.errors import UserError
from paranet_jax.portable.run import TO_SIDE, Scaling

_PREPARABLE = ('cifar10', 'cifar100')  # tfds needs TensorFlow to prepare the others.
_CIFAR_SHAPE = (3, 32, 32)
_HOST_TIMEOUT = 3.0  # Seconds; tfds alone would retry for minutes.

_Builder = Any  # A tfds.core.DatasetBuilder, whose features and attributes depend on the data set.


def dataset_names() -> list[str]:
  """The names of the data sets that tfds has code for."""
  return tfds.list_builders(with_community_datasets=False)


def unknown_place(data_dir: str) -> tuple[list[str], str]:
  """The names of the data sets that are prepared in a folder, and what an error says about it; '': the default one."""
  root = absolute(data_dir or '~/tensorflow_datasets')
  names = [folder.relative_to(root).parts[0] for folder in _prepared(root)]
  where = f', or --config.data.data_dir to the folder where it is prepared (in {root}: {_contents(root)})'
  return names, where if data_dir else ''


def tfds_source(data_config: ConfigDict, image_side: int, channels: int) -> Source | None:
  """An image classification data set prepared in `data_dir` ('': ~/tensorflow_datasets); None if its name is unknown.

  CIFAR-10 and CIFAR-100 are downloaded and prepared there first if necessary. The test split is 'test', or 'validation'
  if there is no 'test' or it has no labels, as that of ImageNet.

  Raises:
    UserError: the data set is not prepared, has another format, is damaged, or is not image classification.
  """
  name, data_dir, on_corrupt = data_config.name, data_config.data_dir, data_config.get('on_corrupt', 'refuse')
  builder = _open_builder(name, data_dir)
  if builder is None:
    _check_place(name, data_dir)
    return None
  if not _is_prepared(builder):
    _check_place(name, builder.data_dir_root, builder)
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

  def records(split: str) -> _TfdsRecords:
    source = builder.as_data_source(splits[split], decoders={keys[0]: tfds.decode.SkipDecoding()})
    where = str(builder.data_dir), splits[split], keys
    return _TfdsRecords(source, *where, image_side, channels, on_corrupt == 'skip', scaling_of(data_config))

  if splits['test'] == 'test' and 'validation' in builder.info.splits and records('test').unlabeled:
    splits['test'] = 'validation'
  folder = Path(builder.data_dir)
  return Source(
    name=name,
    version=str(builder.version),
    class_names=tuple(builder.info.features[keys[1]].names),
    records=records,
    fingerprint=fingerprint(folder, sorted(folder.iterdir()), on_corrupt, *scaling_settings(data_config)),
  )


def _open_builder(name: str, data_dir: str) -> _Builder:
  """None if tfds does not know the name."""
  check_utf8(Path(data_dir), '--config.data.data_dir=...')
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # Some data sets' modules print that TensorFlow is missing.
      return tfds.builder(name, data_dir=str(absolute(data_dir)) if data_dir else None)
  except tfds.core.DatasetNotFoundError:
    return None
  except Exception as error:  # A name that does not parse, an unknown version, damaged metadata.
    _check_place(name, data_dir)
    raise UserError(
      f'expected a data set that tensorflow-datasets can open, found {name!r} ({_one_line(error)}): see '
      f'--config.data.name=... and --config.data.data_dir=...'
    ) from error


def _is_prepared(builder: _Builder) -> bool:
  # is_prepared() logs a warning if the first condition fails.
  return (builder.data_path / 'dataset_info.json').exists() and builder.is_prepared()


def _check_place(name: str, data_dir: str, builder: _Builder | None = None) -> None:
  """Raises UserError if the folder holds another version of the data set, or lies in the data set's own folder."""
  root, (name, _, version) = absolute(data_dir or '~/tensorflow_datasets'), name.partition(':')
  places = (folder for place in (root, root.resolve()) for folder in (place, *place.parents))
  own = next((folder for folder in places if folder.name == name.partition('/')[0]), None)
  if own and _prepared(own.parent, name):
    raise UserError(
      f'expected the folder that holds {name}/, found {root}, which is part of the data set: set '
      f'--config.data.data_dir={own.parent}'
    )
  found = [folder.name for folder in _prepared(root, name)]
  version = version or (str(builder.version) if builder and builder.name not in _PREPARABLE else '')
  if found and version and version not in found:
    raise UserError(
      f'expected {name} {version} prepared in {root}, found only version {", ".join(found)} there: set '
      f'--config.data.name={name}:{found[-1]}'
    )


def _prepared(root: Path, name: str | None = None) -> list[Path]:
  """The folders of the versions of prepared data sets, of all or of one."""
  of = '*' if name is None else glob.escape(name)
  infos = [file for place in ('*', '*/*') for file in root.glob(f'{of}/{place}/dataset_info.json')]
  return sorted(file.parent for file in infos)


def _contents(root: Path) -> str:
  """What a folder holds in place of the data set that was expected."""
  if not root.is_dir():
    return 'a file' if root.exists() else 'no such folder'
  found = [' '.join(folder.relative_to(root).parts) for folder in _prepared(root)]
  found = found or sorted(entry.name for entry in root.iterdir() if entry.name != 'downloads')
  more = f' and {len(found) - 3:,} more' if len(found) > 3 else ''
  return f'only {", ".join(found[:3])}{more} there' if found else 'nothing there'


def _check_format(builder: _Builder) -> None:
  formats = [file_format.value for file_format in builder.info.available_file_formats()]
  if 'array_record' in formats:
    return
  fix = 'choose another folder with --config.data.data_dir=..., and the data set is prepared there'
  if builder.name not in _PREPARABLE:
    fix = _build_command(builder, 'OTHER_FOLDER')
  raise UserError(f'expected array_record files in {builder.data_dir}, found {", ".join(formats)}: {fix}')


def _build_command(builder: _Builder, data_dir: str) -> str:
  return (
    f'run `tfds build {builder.name} --file_format=array_record --data_dir={data_dir}` where TensorFlow is installed, '
    f'and name that folder with --config.data.data_dir=...'
  )


def _feature_keys(builder: _Builder) -> tuple[str, str]:
  """The names of the image feature and the label feature."""
  features, keys = builder.info.features, builder.info.supervised_keys or ('image', 'label')
  found: list[Any] = [features[key] if isinstance(key, str) and key in features else None for key in keys]
  match found:
    case [tfds.features.Image(), tfds.features.ClassLabel()] if found[0].np_dtype != np.float32:
      return keys
  raise UserError(
    f'expected image classification (8-bit or 16-bit images with one class label), found {_one_line(features)} in '
    f'{builder.name}: choose another data set with --config.data.name=...'
  )


@dataclass(frozen=True)
class _TfdsRecords:
  source: Any
  folder: str
  split: str
  keys: tuple[str, str]
  image_side: int
  channels: int
  skip_corrupt: bool
  scaling: Scaling = TO_SIDE

  def __len__(self) -> int:
    return len(self.source)

  def read(self, numbers: Sequence[int]) -> tuple[list[UInt8[np.ndarray, 'H W C'] | None], Int32[np.ndarray, ' n']]:
    images, labels, _ = self._read(numbers)
    return images, labels

  def read_identified(
    self, numbers: Sequence[int]
  ) -> tuple[list[UInt8[np.ndarray, 'H W C'] | None], Int32[np.ndarray, ' n'], Identities]:
    images, labels, encoded = self._read(numbers)
    return images, labels, identities(encoded)

  def _read(
    self, numbers: Sequence[int]
  ) -> tuple[list[UInt8[np.ndarray, 'H W C'] | None], Int32[np.ndarray, ' n'], list[bytes]]:
    image_key, label_key = self.keys
    examples = self._examples(numbers)
    encoded = [example[image_key] for example in examples]
    images = [self._decode(number, image) for number, image in zip(numbers, encoded, strict=True)]
    return images, np.array([example[label_key] for example in examples], np.int32), encoded

  @property
  def unlabeled(self) -> bool:
    """Whether the first record has the label -1, which tfds gives to those that have none."""
    return len(self) > 0 and self._examples([0])[0][self.keys[1]] < 0

  def _examples(self, numbers: Sequence[int]) -> Sequence[dict[str, Any]]:
    try:
      return self.source.__getitems__(list(numbers))
    except (RuntimeError, OSError) as error:
      raise UserError(
        f'expected intact files in {self.folder}, found damage ({_one_line(error)}): remove that folder and prepare '
        f'the data set again'
      ) from error

  def _decode(self, number: int, encoded: bytes) -> UInt8[np.ndarray, 'H W C'] | None:
    where = f'record {number} of {self.split} in {self.folder}'
    return decode_or_skip(encoded, where, self.image_side, self.channels, self.skip_corrupt, self.scaling)


def _prepare(builder: _Builder) -> None:
  """Downloads CIFAR-10 or CIFAR-100, or takes it from the manual folder, and prepares it where the builder looks.

  Raises:
    UserError: it is another data set, or the host, the archive or the folder cannot be used.
  """
  if builder.name not in _PREPARABLE:
    raise UserError(
      f'expected {builder.name} prepared in {builder.data_dir_root}, found {_contents(Path(builder.data_dir_root))}: '
      f'{_build_command(builder, builder.data_dir_root)}'
    )
  archive_builder = _archive_builder(type(builder))(data_dir=builder.data_dir_root)
  _check_archive(archive_builder)
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  try:
    with _only_one(Path(builder.data_dir_root)) as only_one:
      for unfinished in Path(builder.data_dir).parent.glob('incomplete.*') if only_one else ():
        shutil.rmtree(unfinished, ignore_errors=True)  # A process that prepared it was killed.
      archive_builder.download_and_prepare(download_config=config, file_format='array_record')
  except NonMatchingChecksumError as error:
    reason = _one_line(str(error).partition('To debug')[0])
    raise UserError(f'expected the official archive, found another: {reason}: remove that file') from error
  except (OSError, tfds.download.DownloadError) as error:
    raise UserError(
      f'expected to prepare {builder.name} in {builder.data_dir_root}, found: {_one_line(error)}: choose another '
      f'folder with --config.data.data_dir=... or start again'
    ) from error
  if not _is_prepared(builder):  # tfds does not touch a folder that exists, whatever it contains.
    raise UserError(f'expected {builder.name} or nothing in {builder.data_dir}, found other files: remove that folder')


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[bool]:
  """Lets one process at a time prepare data sets in a folder; False if its file system has no locks."""
  folder.mkdir(parents=True, exist_ok=True)
  descriptor, locked = os.open(folder, os.O_RDONLY), False
  try:
    with contextlib.suppress(OSError):
      fcntl.flock(descriptor, fcntl.LOCK_EX)
      locked = True
    yield locked
  finally:
    os.close(descriptor)


def _check_archive(builder: _Builder) -> None:
  """Raises UserError immediately if the archive is not on this machine and its host does not answer."""
  url, downloads = builder.archive_url, Path(builder.data_dir_root) / 'downloads'
  known = builder.url_infos[url]
  manual = downloads / 'manual' / known.filename
  if manual.exists() or any(downloads.rglob(get_dl_fname(url, known.checksum))) or _host_answers(url):
    return
  by_hand = [file.name for file in manual.parent.glob('*')]
  found = f'only {", ".join(by_hand)} in {manual.parent}' if by_hand else _contents(Path(builder.data_dir_root))
  raise UserError(
    f'expected {builder.name} prepared in {builder.data_dir_root} or a network to download it, found {found} and no '
    f'answer from {urlsplit(url).hostname}: put {url} into {manual.parent}/ by hand, or name the folder that holds the '
    f'prepared data set with --config.data.data_dir=...'
  )


def _host_answers(url: str, timeout: float = _HOST_TIMEOUT) -> bool:
  answers = []

  def ask() -> None:
    try:
      answers.append(requests.head(url, timeout=timeout))
    except requests.RequestException:
      pass

  # In a thread, because looking up the host's name has no timeout.
  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  thread.join(timeout)
  return bool(answers)


def _archive_builder(parent: Any) -> Any:
  """tfds's own CIFAR builder, except that it reads the archive with the standard library instead of TensorFlow."""

  class ArchiveBuilder(parent, skip_registration=True):  # pyright: ignore  # The parent is known at run time only.
    __module__ = parent.__module__  # Recorded in the prepared data set; tfds finds the checksums by it.
    name = parent.name

    @property
    def archive_url(self) -> str:
      return self._cifar_info.url

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
      cifar = self._cifar_info
      archive = Path(dl_manager.download(cifar.url))
      for key, file in zip(cifar.label_keys, cifar.label_files, strict=True):
        self.info.features[key].names = _read_member(archive, cifar.prefix + file).decode().split()
      files = {'train': cifar.train_files, 'test': cifar.test_files}
      return {split: self._generate_examples(split, archive, names) for split, names in files.items()}

    def _generate_examples(self, split: str, archive: Path, files: list[str]) -> Iterator[tuple[int, dict]]:
      cifar = self._cifar_info
      records = _read_cifar(archive, [cifar.prefix + file for file in files], len(cifar.label_keys))
      for index, (labels, image) in enumerate(records):
        yield index, {'id': f'{split}_{index:05d}', 'image': image, **dict(zip(cifar.label_keys, labels, strict=True))}

  return ArchiveBuilder


def _read_cifar(archive: Path, members: Sequence[str], num_labels: int) -> Iterator[tuple[list[int], bytes]]:
  """Yields the labels of each record and its image as PNG."""
  for member in members:
    records = np.frombuffer(_read_member(archive, member), np.uint8).reshape(-1, num_labels + np.prod(_CIFAR_SHAPE))
    for record in records:
      pixels = record[num_labels:].reshape(_CIFAR_SHAPE).transpose(1, 2, 0)
      encoded = io.BytesIO()
      Image.fromarray(np.ascontiguousarray(pixels)).save(encoded, 'PNG')
      yield record[:num_labels].tolist(), encoded.getvalue()


def _read_member(archive: Path, member: str) -> bytes:
  with tarfile.open(archive, 'r|gz') as tar:  # As a stream: the archive is decompressed only up to the member.
    for entry in tar:
      if entry.name == member and (file := tar.extractfile(entry)):
        return file.read()
  raise KeyError(f'{member} in {archive}')


def _one_line(message: object) -> str:
  return ' '.join(str(message).split())
