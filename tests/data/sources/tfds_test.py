"""tensorflow-datasets: small data sets prepared on the spot, and archives in the official form."""

import functools
import hashlib
import http.server
import io
import pickle
import re
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from odd_images import chunk, with_chunk
from PIL import Image
from tensorflow_datasets.core.download.checksums import UrlInfo

from paranet_jax.data.load import load_dataset
from paranet_jax.data.sources import tfds as tfds_source
from paranet_jax.host.errors import UserError

CLOSED = 'http://127.0.0.1:9'  # Nothing listens on the discard port.


def load(name, data_dir, image_side=32, channels=3, **changes):
  config = {'name': name, 'data_dir': str(data_dir), 'held_out': 0, 'crop_padding': None, 'flip': None}
  config |= {'streaming': None, 'workers': 0, **changes}
  return load_dataset(ConfigDict(config), image_side=image_side, channels=channels)


# The official archives, with a few random records.


class Archive:
  """Random records, ten a file, in the official archive's form; tfds expects this archive's checksum."""

  def __init__(self, name, monkeypatch, host=CLOSED):
    builder = tfds.builder_cls(name)
    info = builder(data_dir='/unused')._cifar_info
    self.file_name = f'{name[:5]}-{name[5:]}-binary.tar.gz'
    self.class_names = [f'class_{label}' for label in range(100 if name == 'cifar100' else 10)]
    self.splits = {}
    members = {info.prefix + file: self._names(file) for file in info.label_files}
    for split, files in {'train': info.train_files, 'test': info.test_files}.items():
      images, labels = self._records(10 * len(files), len(split))
      self.splits[split] = images, labels
      for place, file in enumerate(files):
        chosen = slice(10 * place, 10 * place + 10)
        members[info.prefix + file] = self._encode(images[chosen], labels[chosen], len(info.label_keys))
    self.content = self._tar(members)
    url = f'{host}/{self.file_name}'
    url_info = UrlInfo(
      size=len(self.content), checksum=hashlib.sha256(self.content).hexdigest(), filename=self.file_name
    )
    monkeypatch.setattr(builder, '_cifar_info', info._replace(url=url))
    monkeypatch.setattr(builder, 'url_infos', {url: url_info})

  def _names(self, file):
    names = [f'coarse_{label}' for label in range(20)] if 'coarse' in file else self.class_names
    return ('\n'.join(names) + '\n').encode()

  def _records(self, count, seed):
    random = np.random.RandomState(seed)
    images = random.randint(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    return images, random.randint(0, len(self.class_names), count).astype(np.uint8)

  def _encode(self, images, labels, num_labels):
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    label_bytes = np.zeros((len(images), num_labels), np.uint8)
    label_bytes[:, -1] = labels  # CIFAR-100: the coarse label stays 0, the fine one is last.
    return np.concatenate([label_bytes, pixels], axis=1).tobytes()

  def _tar(self, members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w:gz') as tar:
      for name, content in members.items():
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()

  def put_by_hand(self, data_dir):
    manual = data_dir / 'downloads' / 'manual'
    manual.mkdir(parents=True)
    (manual / self.file_name).write_bytes(self.content)
    return manual / self.file_name

  def check(self, dataset):
    assert dataset.class_names == tuple(self.class_names)
    for split, (images, labels) in self.splits.items():
      found = getattr(dataset, split)
      # tfds shuffles while preparing: compare as sets of (label, pixels).
      expected = sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))
      assert sorted((int(label), i.tobytes()) for i, label in zip(found.images, found.labels, strict=True)) == expected


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_prepares_an_archive_put_by_hand(name, tmp_path, monkeypatch):
  archive = Archive(name, monkeypatch)
  archive.put_by_hand(tmp_path)
  (tmp_path / name / 'incomplete.ABC_3.0.2').mkdir(parents=True)  # What a killed process left.
  dataset = load(name, tmp_path)
  archive.check(dataset)
  assert [path.name for path in (tmp_path / name).iterdir()] == ['3.0.2']
  assert (dataset.version, dataset.crop_padding, dataset.flip) == ('3.0.2', 4, True)
  prepared = tfds.builder(name, data_dir=tmp_path)
  assert prepared.info.file_format.value == 'array_record'
  assert 'tensorflow_datasets.image_classification.cifar' in (prepared.data_path / 'dataset_info.json').read_text()
  assert type(prepared) is tfds.builder_cls(name)  # The registry still has tfds's own.


def test_prepared_data_is_left_alone(tmp_path, monkeypatch):
  archive = Archive('cifar10', monkeypatch)
  archive.put_by_hand(tmp_path)
  load('cifar10', tmp_path)
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path / 'other_cache'))
  before = sorted(tmp_path.joinpath('cifar10').rglob('*'))
  times = [file.stat().st_mtime_ns for file in before]
  archive.check(load('cifar10', tmp_path))
  assert sorted(tmp_path.joinpath('cifar10').rglob('*')) == before
  assert [file.stat().st_mtime_ns for file in before] == times


@pytest.fixture
def served_folder(tmp_path):
  """A folder and the address of a web server that serves it."""
  folder = tmp_path / 'served'
  folder.mkdir()

  class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  handler = functools.partial(QuietHandler, directory=folder)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    thread.join()


def test_downloads_and_prepares(tmp_path, monkeypatch, served_folder):
  folder, host = served_folder
  archive = Archive('cifar100', monkeypatch, host)
  (folder / archive.file_name).write_bytes(archive.content)
  archive.check(load('cifar100', tmp_path / 'data'))


def test_a_finished_download_needs_no_network(tmp_path, monkeypatch, served_folder):
  folder, host = served_folder
  archive = Archive('cifar10', monkeypatch, host)
  (folder / archive.file_name).write_bytes(archive.content)
  load('cifar10', tmp_path / 'data')
  (tmp_path / 'data' / 'cifar10').rename(tmp_path / 'gone')
  monkeypatch.setattr(tfds_source, '_host_answers', lambda url: False)
  archive.check(load('cifar10', tmp_path / 'data'))


def test_no_archive_at_the_host(tmp_path, monkeypatch, served_folder):
  Archive('cifar10', monkeypatch, served_folder[1])
  with pytest.raises(UserError, match='expected to prepare cifar10 in .*, found: Failed to get url .* HTTP code: 404'):
    load('cifar10', tmp_path / 'data')


def test_no_network(tmp_path, monkeypatch):
  archive = Archive('cifar100', monkeypatch)
  message = (
    f'expected cifar100 prepared in {tmp_path} or a network to download it, found nothing there and no answer from '
    f'127.0.0.1: put {CLOSED}/{archive.file_name} into {tmp_path}/downloads/manual/ by hand, or .*config.data.data_dir='
  )
  with pytest.raises(UserError, match=message):
    load('cifar100', tmp_path)
  assert not list(tmp_path.iterdir())


def test_official_addresses():
  archives = {name: tfds_source._archive_builder(tfds.builder_cls(name)) for name in ('cifar10', 'cifar100')}
  for name, number in [('cifar10', '10'), ('cifar100', '100')]:
    url = archives[name](data_dir='/unused').archive_url
    assert url == f'https://www.cs.toronto.edu/~kriz/cifar-{number}-binary.tar.gz'
    assert archives[name].url_infos[url].filename == f'cifar-{number}-binary.tar.gz'


def test_a_silent_host_is_not_waited_for(monkeypatch):
  released = threading.Event()
  monkeypatch.setattr(requests, 'head', lambda *args, **kwargs: released.wait(30))
  assert not tfds_source._host_answers('http://silent.example', timeout=0.05)
  released.set()


def test_an_archive_without_a_member(tmp_path, monkeypatch):
  archive = Archive('cifar10', monkeypatch).put_by_hand(tmp_path)
  with pytest.raises(KeyError, match=f'none in {archive}'):
    tfds_source._read_member(archive, 'none')


@pytest.mark.parametrize('truncated', [False, True])
def test_wrong_archive(tmp_path, monkeypatch, truncated):
  archive = Archive('cifar10', monkeypatch)
  expected = hashlib.sha256(archive.content).hexdigest()
  archive.content = archive.content[:1000] if truncated else b'another archive'
  manual = archive.put_by_hand(tmp_path)
  found = hashlib.sha256(archive.content).hexdigest()
  with pytest.raises(
    UserError, match=f'{manual}, has wrong checksum: .*{expected}.*{found}.*: remove that file'
  ) as error:
    load('cifar10', tmp_path)
  assert '\n' not in str(error.value)
  assert manual.exists()


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
  archive = Archive('cifar10', monkeypatch)
  archive.put_by_hand(tmp_path)
  (tmp_path / 'cifar10').write_text('a file where the data should go')
  with pytest.raises(UserError, match='expected to prepare cifar10 in .*: choose another folder with --config.data'):
    load('cifar10', tmp_path)


def test_folder_with_other_files(tmp_path, monkeypatch):
  archive = Archive('cifar10', monkeypatch)
  archive.put_by_hand(tmp_path)
  (tmp_path / 'cifar10' / '3.0.2').mkdir(parents=True)
  with pytest.raises(UserError, match='expected cifar10 or nothing in .*3.0.2, found other files: remove that folder'):
    load('cifar10', tmp_path)


# Other prepared data sets.


class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set of two splits, prepared as array_record; subclasses say what is in it."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = {}
  KEYS = None
  SPLITS = {}

  def _info(self):
    features = tfds.features.FeaturesDict(dict(self.FEATURES))
    return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=self.KEYS)

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(examples) for split, examples in self.SPLITS.items()}

  def _generate_examples(self, examples):
    yield from enumerate(examples)


def png(value, size=(28, 28), mode='L'):
  file = io.BytesIO()
  Image.new(mode, size, value).save(file, 'PNG')
  return file.getvalue()


def prepare(data_dir, name, features, examples, keys=None, splits=('train', 'test'), version='1.0.0'):
  splits = splits if isinstance(splits, dict) else dict.fromkeys(splits, examples)
  fields = {'FEATURES': features, 'KEYS': keys, 'SPLITS': splits, 'name': name}
  fields['VERSION'] = tfds.core.Version(version)
  builder = type(name, (Prepared,), fields, skip_registration=True)(data_dir=data_dir)
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  builder.download_and_prepare(file_format='array_record', download_config=config)
  return Path(builder.data_dir)


def prepare_two(data_dir, name='tiny_shapes', image=None, **options):
  """Prepares a data set of two equal images a split."""
  image = png(1) if image is None else image
  return prepare(data_dir, name, image_and_label(), [{'image': image, 'label': 0}] * 2, **options)


def image_and_label(image='image', label='label', **options):
  return {
    image: tfds.features.Image(shape=(28, 28, 1), **options),
    label: tfds.features.ClassLabel(names=['round', 'square', 'flat']),
  }


def test_any_prepared_data_set_by_its_supervised_keys(tmp_path):
  examples = [{'picture': png(10 * label), 'kind': label} for label in (2, 0, 1)]
  features = image_and_label('picture', 'kind')
  prepare(tmp_path, 'tiny_shapes', features, examples, keys=('picture', 'kind'), splits=('train', 'validation'))
  dataset = load('tiny_shapes', tmp_path)
  assert dataset.class_names == ('round', 'square', 'flat')
  assert dataset.train.images.shape == (3, 32, 32, 3) and dataset.train.labels.dtype == np.int32
  for split in (dataset.train, dataset.test):
    np.testing.assert_array_equal(split.images, np.broadcast_to(10 * split.labels[:, None, None, None], (3, 32, 32, 3)))
  assert (dataset.name, dataset.version) == ('tiny_shapes', '1.0.0')
  assert (dataset.crop_padding, dataset.flip) == (4, True)


def test_images_that_stay_in_their_files_are_the_same(tmp_path):
  examples = [{'image': png(10 * number), 'label': number % 3} for number in range(7)]
  prepare(tmp_path, 'tiny_shapes', image_and_label(), examples)
  stored, decoded = load('tiny_shapes', tmp_path, streaming=True), load('tiny_shapes', tmp_path)
  for found, expected in ((stored.train, decoded.train), (stored.test, decoded.test)):
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found.images))[:], expected.images)  # As for a worker.
    np.testing.assert_array_equal(found.labels, expected.labels)
  assert stored.train.streamed and (stored.mean, stored.std) == (decoded.mean, decoded.std)


def test_characters_are_not_mirrored(tmp_path):
  version = str(tfds.builder_cls('mnist').VERSION)
  prepare_two(tmp_path, 'mnist', version=version)
  dataset = load('mnist', tmp_path, channels=1)
  assert dataset.flip is False and dataset.train.images.shape == (2, 32, 32, 1)
  assert load('mnist', tmp_path, flip=True).flip is True


def test_another_prepared_set_of_the_same_name_and_version(tmp_path):
  for value in (1, 2):
    prepare_two(tmp_path / str(value), image=png(value))
  for value in (1, 2):
    assert load('tiny_shapes', tmp_path / str(value)).train.images.max() == value


def test_home_is_expanded(tmp_path, monkeypatch):
  prepare_two(tmp_path / 'data')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert len(load('tiny_shapes', '~/data').train) == 2


def test_damaged_file(tmp_path):
  folder = prepare_two(tmp_path)
  for file in folder.glob('*.array_record*'):
    file.write_bytes(file.read_bytes()[:1000])
  with pytest.raises(
    UserError, match='expected intact files in .*tiny_shapes/1.0.0, found damage .*: remove that folder'
  ):
    load('tiny_shapes', tmp_path)


def test_damaged_image(tmp_path, caplog):
  examples = [{'image': png(1)[:30] if number == 1 else png(number), 'label': 0} for number in range(4)]
  prepare(tmp_path, 'tiny_shapes', image_and_label(), examples)
  where = 'record [0-3] of train in .*tiny_shapes/1.0.0'
  message = f'expected an image, found a corrupt {where} .*: fix or remove it, or set --config.data.on_corrupt=skip'
  with pytest.raises(UserError, match=message):
    load('tiny_shapes', tmp_path)
  for streaming in (False, True):
    dataset = load('tiny_shapes', tmp_path, on_corrupt='skip', streaming=streaming)
    assert (len(dataset.train), len(dataset.test), dataset.skipped) == (3, 3, 2)
    assert sorted(np.unique(dataset.train.images[:])) == [0, 2, 3]
  assert re.search(f'Skipping corrupt {where}: ', caplog.text)


@pytest.mark.filterwarnings('ignore')
def test_damaged_exif(tmp_path):
  damaged = with_chunk(png(7), chunk(b'eXIf', b'\0\x08\0\x02\x01\x12\0\x03'))
  prepare_two(tmp_path, image=damaged)
  assert load('tiny_shapes', tmp_path).train.images.max() == 7


def test_damaged_metadata(tmp_path):
  folder = prepare_two(tmp_path)
  (folder / 'dataset_info.json').write_text('{')
  with pytest.raises(UserError, match="tensorflow-datasets can open, found 'tiny_shapes' .*--config.data.data_dir="):
    load('tiny_shapes', tmp_path)


@pytest.mark.parametrize('name', ['cifar10', 'tiny_shapes'])
def test_another_format(name, tmp_path):
  version = '3.0.2' if name == 'cifar10' else '1.0.0'
  folder = prepare_two(tmp_path, name, version=version)
  info = folder / 'dataset_info.json'
  info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
  fix = {
    'cifar10': 'choose another folder with --config.data.data_dir=..., and the data set is prepared there',
    'tiny_shapes': 'run `tfds build tiny_shapes --file_format=array_record --data_dir=OTHER_FOLDER` where TensorFlow',
  }[name]
  with pytest.raises(UserError, match=f'expected array_record files in {folder}, found tfrecord: {fix}'):
    load(name, tmp_path)


def test_not_prepared(tmp_path):
  message = (
    f'expected mnist prepared in {tmp_path}, found nothing there: run `tfds build mnist --file_format=array_record'
  )
  with pytest.raises(UserError, match=f'{message} --data_dir={tmp_path}` where TensorFlow is installed'):
    load('mnist', tmp_path)


def test_a_folder_that_is_not_the_place(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds_source, '_host_answers', lambda url: False)
  folder = prepare_two(tmp_path / 'data', version='1.0.0')
  prepare_two(tmp_path / 'data', version='1.1.0')
  prepare_two(tmp_path / 'data', 'mnist', version='2.0.0')
  place = f'set --config.data.data_dir={tmp_path}/data'
  for inside in (folder, folder.parent):
    message = f'expected the folder that holds tiny_shapes/, found {inside}, which is part of the data set: {place}'
    with pytest.raises(UserError, match=message):
      load('tiny_shapes', inside)
  for name, message in {
    'mnist': 'mnist 3.0.1 prepared in .*/data, found only version 2.0.0 there: set --config.data.name=mnist:2.0.0',
    'tiny_shapes:3.0.0': '3.0.0 .* only version 1.0.0, 1.1.0 there: set --config.data.name=tiny_shapes:1.1.0',
    'mnist:9.9.9': 'mnist 9.9.9 prepared in .*/data, found only version 2.0.0 there: set',
    'fashion_mnist': 'found only mnist 2.0.0, tiny_shapes 1.0.0, tiny_shapes 1.1.0 there: run `tfds build',
    'cifar10': 'found only mnist 2.0.0, tiny_shapes 1.0.0, tiny_shapes 1.1.0 there and no answer from www.cs.toronto',
  }.items():
    with pytest.raises(UserError, match=message):
      load(name, tmp_path / 'data')
  (tmp_path / 'link').symlink_to(folder)
  with pytest.raises(UserError, match=f'/link, which is part of the data set: {place}'):
    load('tiny_shapes', tmp_path / 'link')
  where = r'; set --config.data.name=\.\.\., or --config.data.data_dir to the folder where it is prepared \(in {}: {}\)'
  (tmp_path / 'file').write_text('')
  for name, held, near in (
    ('file', 'a file', 'tiny_shakespeare, cityscapes'),
    ('none', 'no such folder', 'tiny_shakespeare, cityscapes'),
    ('data', 'only mnist 2.0.0, tiny_shapes 1.0.0, tiny_shapes 1.1.0 there', 'tiny_shapes, '),
  ):
    wanted = 'tiny_shapes' if name != 'data' else 'tiny_shape'
    with pytest.raises(
      UserError, match=f"unknown data set '{wanted}'; nearest: {near}.*{where.format(tmp_path / name, held)}$"
    ):
      load(wanted, tmp_path / name)
  with pytest.raises(UserError, match='expected mnist prepared in .*/none, found no such folder: run'):
    load('mnist', tmp_path / 'none')
  with pytest.raises(UserError, match='expected mnist prepared in .*, found only 1.0.0, 1.1.0 there: run'):
    load('mnist', folder.parent.rename(tmp_path / 'renamed'))
  assert len(load('mnist:2.0.0', tmp_path / 'data').train) == 2


def test_a_folder_whose_path_is_not_utf_8(tmp_path):
  with pytest.raises(
    UserError, match='a folder whose path is UTF-8, found .*; rename it, or set --config.data.data_dir='
  ):
    load('tiny_shapes', tmp_path / 'caf\udce9')


@pytest.mark.parametrize('name', ['cifar-10-python.tar.gz', 'renamed.tar.gz', 'cifar-10-batches-bin'])
def test_another_archive_put_by_hand(tmp_path, monkeypatch, name):
  put = Archive('cifar10', monkeypatch).put_by_hand(tmp_path)
  manual = put.rename(put.with_name(name)).parent
  if name == 'cifar-10-batches-bin':  # Extracted.
    (manual / name).unlink()
    (manual / name).mkdir()
  with pytest.raises(UserError, match=f'found only {name} in {manual} and no answer from 127.0.0.1: put {CLOSED}'):
    load('cifar10', tmp_path)


NOT_CLASSIFICATION = {
  'no label': {'image': tfds.features.Image(shape=(28, 28, 1))},
  'a label without classes': {'image': tfds.features.Image(shape=(28, 28, 1)), 'label': np.int64},
  'float images': image_and_label(dtype=np.float32),
}


@pytest.mark.parametrize('case', NOT_CLASSIFICATION)
def test_not_image_classification(case, tmp_path):
  folder = prepare(tmp_path, 'tiny_shapes', {'id': np.int64}, [{'id': 1}])
  tfds.features.FeaturesDict(NOT_CLASSIFICATION[case]).save_config(folder)  # What is refused before any is read.
  with pytest.raises(UserError, match='expected image classification .*, found .* in tiny_shapes: choose another'):
    load('tiny_shapes', tmp_path)


@pytest.mark.parametrize(('label', 'pixel'), [(-1, 2), (1, 3)])
def test_a_test_split_without_labels(label, pixel, tmp_path):
  """That of ImageNet; the images of train, validation and test are 1, 2 and 3."""
  labels = {'train': 0, 'validation': 1, 'test': label}
  splits = {name: [{'image': png(i), 'label': labels[name]}] * 2 for i, name in enumerate(labels, 1)}
  prepare(tmp_path, 'tiny_shapes', image_and_label(), [], splits=splits)
  assert np.unique(load('tiny_shapes', tmp_path).test.images).tolist() == [pixel]


def test_no_test_split(tmp_path):
  prepare_two(tmp_path, splits=('train', 'extra'))
  with pytest.raises(UserError, match='in tiny_shapes, found no validation but train, extra: choose another'):
    load('tiny_shapes', tmp_path)


@pytest.mark.parametrize('name', ['cifar100:1.0.0', 'a b', 'cifar**'])
def test_names_that_do_not_open(name, tmp_path):
  with pytest.raises(UserError, match='expected a data set that tensorflow-datasets can open, found') as error:
    load(name, tmp_path)
  assert '\n' not in str(error.value)
