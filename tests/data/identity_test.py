"""Tests of splits that follow from the content of images, and of what a run notices when its images changed."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from paranet_jax.data.dataset import Source
from paranet_jax.data.identity import Known, choose_limits, compare, drawn, identities, together
from paranet_jax.data.load import load_dataset
from paranet_jax.host.errors import UserError
from paranet_jax.runs.dataset_facts import save_weights_facts
from paranet_jax.runs.learned import IDENTITY, restore_learned, save_learned

HELD_OUT = 6


@pytest.fixture
def photos(tmp_path, monkeypatch):
  """20 different images of each of two classes, 4 x 4."""
  monkeypatch.delenv('PARANET_DATA_DIR', raising=False)
  for label, name in enumerate(('cat', 'dog')):
    for number in range(20):
      write(tmp_path / 'photos' / name / f'{number:02}.png', 100 * label + number)
  return tmp_path / 'photos'


def write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', (4, 4), (value, 0, 0)).save(path)


def load(folder, learned=None, streaming=False, num_classes=None, **changes):
  config = {'name': 'folder', 'data_dir': str(folder), 'held_out': HELD_OUT, 'test_fraction': 0.2, 'workers': 0}
  config |= {'on_corrupt': 'refuse', 'crop_padding': 0, 'flip': False, 'streaming': streaming}
  return load_dataset(ConfigDict(config | changes), image_side=4, channels=3, num_classes=num_classes, learned=learned)


def values(split):
  """The images of a split: each has a red value of its own, 100 and more for a dog."""
  return {(int(label), int(image[0, 0, 0])) for image, label in zip(split.images[:], split.labels, strict=True)}


def splits(dataset):
  return {name: values(getattr(dataset, name)) for name in ('train', 'held_out', 'test')}


@pytest.fixture
def run(photos, tmp_path):
  """A run's folder with what it recorded, and the data set."""
  (tmp_path / 'run').mkdir()
  dataset = load(photos)
  save_learned(tmp_path / 'run', dataset)
  return tmp_path / 'run', dataset


def again(run, folder, accept=False, **changes):
  return load(folder, restore_learned(run[0], channels=3, accept_changes=accept), **changes)


def test_sizes_and_classes_of_the_splits(photos):
  found = splits(load(photos))
  assert [len(found[name]) for name in ('train', 'held_out', 'test')] == [26, 6, 8]
  assert all(sum(label for label, _ in found[name]) * 2 == len(found[name]) for name in found)
  assert found['train'] | found['held_out'] | found['test'] == {(n // 100, n) for n in (*range(20), *range(100, 120))}


def test_streamed_images_are_split_alike(photos):
  stored, decoded = load(photos, streaming=True), load(photos)
  assert splits(stored) == splits(decoded)
  assert (stored.mean, stored.std) == (decoded.mean, decoded.std)
  np.testing.assert_array_equal(stored.test.identities, decoded.test.identities)


def test_statistics_are_of_the_images_that_are_not_tested_on(photos):
  dataset = load(photos)
  reds = [red for name in ('train', 'held_out') for _, red in splits(dataset)[name]]
  np.testing.assert_allclose(dataset.mean, [np.mean(reds) / 255, 0, 0], rtol=1e-12)
  np.testing.assert_allclose(dataset.std, [np.std(reds) / 255, 1, 1], rtol=1e-12)


@pytest.mark.parametrize('streaming', [False, True])
def test_nothing_changed(run, photos, caplog, streaming):
  assert splits(again(run, photos, streaming=streaming)) == splits(run[1])
  shutil.move(photos / 'cat/00.png', photos / 'cat/zz.png')  # Names and places are no part of an image.
  shutil.move(photos, photos.with_name('moved'))
  assert splits(again(run, photos.with_name('moved'), streaming=streaming)) == splits(run[1])
  assert not caplog.messages


def added(photos):
  for number in (50, 51, 52):
    write(photos / f'cat/0{number}.png', number)


def removed(photos):
  for number in (3, 7):
    os.remove(photos / f'dog/{number:02}.png')


def replaced(photos):
  write(photos / 'cat/05.png', 77)


@pytest.mark.parametrize(
  ('change', 'new', 'gone'),
  [
    (added, {(0, 50), (0, 51), (0, 52)}, set()),
    (removed, set(), {(1, 103), (1, 107)}),
    (replaced, {(0, 77)}, {(0, 5)}),
  ],
)
def test_no_other_image_moves(run, photos, caplog, change, new, gone):
  change(photos)
  dataset = again(run, photos)
  found, before = splits(dataset), splits(run[1])
  for name in found:
    assert found[name] - new == before[name] - gone
  assert set.union(*found.values()) - set.union(*before.values()) == new
  assert (dataset.mean, dataset.std) == (run[1].mean, run[1].std)  # The run's own, whatever the images are now.
  (line,) = caplog.messages
  counts = {name: (len(found[name] & new), len(before[name] & gone)) for name in ('train', 'test', 'held_out')}
  assert ', '.join(f'{a} added, {b} gone' for a, b in [counts['train']]) in line
  for name, (more, fewer) in counts.items():
    assert f'{name} {more} added, {fewer} gone' in line


def test_without_a_record_hardly_an_image_moves(photos):
  before = splits(load(photos))
  write(photos / 'cat/000.png', 50)
  found = splits(load(photos))
  assert not (found['held_out'] | found['test']) & before['train']


def test_an_image_replaced_with_the_same_size_and_time(photos):
  before = load(photos)
  path = photos / 'cat/01.png'
  stat = path.stat()
  write(path, 99)
  assert path.stat().st_size == stat.st_size
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert set.union(*splits(load(photos)).values()) ^ set.union(*splits(before).values()) == {(0, 1), (0, 99)}


def rename(old, new):
  return lambda photos: shutil.move(photos / old, photos / new)


def swap(photos):
  for old, new in (('cat', 'x'), ('dog', 'cat'), ('x', 'dog')):
    shutil.move(photos / old, photos / new)


def add_class(photos):
  for number in range(20):
    write(photos / f'bird/{number}.png', 200 + number)


CHANGED = [
  (rename('dog', 'apple'), "found 'apple' as class 1 of {photos}, which was 'cat': restore it, "),
  (rename('cat', 'eel'), "found 'dog' as class 1 of {photos}, which was 'cat': restore it, "),
  (swap, "found 40 images of {photos} with another class, the first 'cat', which was 'dog': restore them, "),
  (add_class, "found class 'bird' added to {photos}: remove it, "),
  (
    lambda photos: (add_class(photos), shutil.rmtree(photos / 'dog')),
    "found 'bird' as class 1 of {photos}, which was ",
  ),
]


@pytest.mark.parametrize('num_classes', [None, 2])
@pytest.mark.parametrize(('change', 'message'), CHANGED)
def test_changed_classes_are_refused(run, photos, change, message, num_classes):
  change(photos)
  with pytest.raises(UserError) as error:
    again(run, photos, num_classes=num_classes)
  assert message.format(photos=photos) in str(error.value) and '--accept_data_changes' in str(error.value)
  assert str(run[0]) in str(error.value)


def test_folders_are_the_classes_of_weights_by_their_names(photos, tmp_path):
  """Those of ImageNet are not in alphabetical order, and a folder need not have all of them."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  save_weights_facts(workdir, 'imagenet', ('dog', 'newt', 'cat'), (0.5, 0, 0), (0.5, 1, 1))
  for _ in range(2):  # At its start, and when it is resumed.
    dataset = again((workdir,), photos)
    assert dataset.class_names == ('dog', 'newt', 'cat')
    labels = {label for label, red in set.union(*splits(dataset).values()) if red >= 100}
    assert labels == {0} and set(dataset.train.labels) == {0, 2}
    save_learned(workdir, dataset)
  (tmp_path / 'other').mkdir()
  save_weights_facts(tmp_path / 'other', 'imagenet', ('class 0', 'class 1'), (0.5, 0, 0), (0.5, 1, 1))
  with pytest.raises(UserError) as error:
    again((tmp_path / 'other',), photos)
  assert str(error.value) == (
    f"expected folders named after the 2 classes of the weights, such as 'class 0', found 'cat' in {photos}: rename or "
    'remove it, or set --classes of adopt, which learns the classes of the folders'
  )


def test_a_class_is_gone(run, photos, tmp_path):
  add_class(photos)
  (tmp_path / 'three').mkdir()
  save_learned(tmp_path / 'three', load(photos))
  shutil.rmtree(photos / 'bird')
  with pytest.raises(UserError, match=f"found no class 'bird' in {photos}: restore it, or set --accept_data_changes"):
    again((tmp_path / 'three',), photos)
  dataset = again((tmp_path / 'three',), photos, accept=True)
  assert dataset.class_names == ('bird', 'cat', 'dog') and set(dataset.train.labels) == {1, 2}


@pytest.mark.parametrize('num_classes', [None, 2])
def test_accepted_the_run_keeps_its_names(run, photos, caplog, num_classes):
  rename('dog', 'apple')(photos)
  dataset = again(run, photos, accept=True, num_classes=num_classes)
  assert dataset.class_names == ('cat', 'dog')
  assert splits(dataset) == splits(run[1])  # By their content, the apples are the dogs.
  add_class(photos)
  dataset = again(run, photos, accept=True, num_classes=num_classes)
  assert splits(dataset) == splits(run[1])
  assert any('Leaving out the images of bird' in line for line in caplog.messages)
  save_learned(run[0], dataset)
  assert restore_learned(run[0], channels=3).class_names == ('cat', 'dog')


def test_images_that_were_trained_on_are_left_out(run, photos, caplog):
  before = splits(run[1])
  moved = sorted(red for label, red in before['train'] if label == 0)
  for red in moved:
    shutil.move(photos / f'cat/{red:02}.png', photos / f'dog/cat{red}.png')
  with pytest.raises(UserError, match=f'found {len(moved)} images of .* with another class'):
    again(run, photos)
  dataset = again(run, photos, accept=True)
  reds = {red for name in ('held_out', 'test') for _, red in splits(dataset)[name]}
  assert not reds & {red for _, red in before['train']}
  # Resumed, the run has learned the new labels, which then are no change.
  save_learned(run[0], dataset)
  assert splits(again(run, photos)) == splits(dataset)


@pytest.fixture
def halves(photos, tmp_path):
  """A run on cats and dogs in train/ and test/, 4 and 2 of each."""
  for split, numbers in (('train', range(4)), ('test', range(4, 6))):
    for label, name in enumerate(('cat', 'dog')):
      for number in numbers:
        write(tmp_path / 'both' / split / name / f'{number}.png', 100 * label + number)
  (tmp_path / 'run').mkdir()
  save_learned(tmp_path / 'run', load(tmp_path / 'both', held_out=0))
  return (tmp_path / 'run',), tmp_path / 'both'


def test_a_class_without_other_images_is_lost(halves):
  run, both = halves
  for number in (4, 5):
    shutil.copy(both / f'train/dog/{number - 4}.png', both / f'test/dog/{number}.png')
  dataset = again(run, both, held_out=0)
  assert dataset.lost == ('dog',) and values(dataset.test) == {(0, 4), (0, 5)}


def test_only_images_that_were_trained_on(halves):
  run, both = halves
  for old, new in (('train', 'x'), ('test', 'train'), ('x', 'test')):
    shutil.move(both / old, both / new)
  with pytest.raises(UserError, match=r'images in test of .* found none \(8 left out\): restore the splits'):
    again(run, both, accept=True, held_out=0)


def test_a_split_whose_images_have_gone(run, photos):
  for label, red in splits(run[1])['test']:
    (photos / ('cat', 'dog')[label] / f'{red - 100 * label:02}.png').unlink()
  message = 'expected images in test of .*photos, found no image drawn for it: restore those of the run in .*run, or'
  with pytest.raises(UserError, match=message):
    again(run, photos)


def test_the_only_image_drawn_is_in_another_class(tmp_path):
  """One of five images is tested on, of the class that has four; an image in two classes has the lower limit."""
  for number in range(4):
    write(tmp_path / f'p/cat/{number}.png', number)
  write(tmp_path / 'p/dog/0.png', 100)
  ((label, red),) = values(load(tmp_path / 'p', held_out=0).test)
  assert label == 0
  write(tmp_path / 'p/dog/0.png', red)
  message = 'found no image drawn for it: add images that are in one class only, or raise --config.data.test_fraction$'
  with pytest.raises(UserError, match=message):
    load(tmp_path / 'p', held_out=0)


def test_how_many_images_are_left_out_is_said(halves, caplog):
  run, both = halves
  for kind in ('cat', 'dog'):
    shutil.move(both / f'train/{kind}/0.png', both / f'test/{kind}/0.png')
    shutil.move(both / f'test/{kind}/4.png', both / f'train/{kind}/4.png')
  dataset = again(run, both, held_out=0)
  said = f'test leaves out 2 images that the run in {run[0]} was trained on; 2 stay in'
  assert said in caplog.messages and len(dataset.test) == 2
  learns = f'train has 2 images that were in test of the run in {run[0]}: a resumed training learns them'
  assert learns in caplog.messages
  save_learned(run[0], dataset)  # Resumed: it has now learned them, wherever they are next.
  for kind in ('cat', 'dog'):
    shutil.move(both / f'train/{kind}/4.png', both / f'test/{kind}/4.png')
  assert values(again(run, both, held_out=0).test) == {(0, 5), (1, 105)}


def test_a_class_renamed_in_unicode_form_only(run, photos, tmp_path):
  rename('dog', 'caf\u00e9')(photos)
  (tmp_path / 'cafe').mkdir()
  save_learned(tmp_path / 'cafe', load(photos))
  rename('caf\u00e9', 'cafe\u0301')(photos)
  with pytest.raises(UserError) as error:
    again((tmp_path / 'cafe',), photos)
  said = f"found 'cafe\\u0301' in {photos}, which was 'caf\\xe9' (they differ only in their Unicode form): restore it"
  assert said in str(error.value)


def test_none_of_the_images(run, photos, tmp_path):
  for name, base in (('cat', 30), ('dog', 130)):
    for number in range(10):
      write(tmp_path / 'other' / name / f'{number}.png', base + number)
  with pytest.raises(UserError, match='found none of them in .*/other: set --data_dir to their place, or'):
    again(run, tmp_path / 'other')
  assert len(again(run, tmp_path / 'other', accept=True).train) > 0


def test_another_number_held_out(run, photos):
  """A larger split would have images that the run was trained on; a smaller one is a part of the old one."""
  before = splits(run[1])
  assert values(again(run, photos, held_out=2).held_out) < before['held_out']
  assert values(again(run, photos, held_out=12).held_out) == before['held_out']


@pytest.mark.parametrize('damage', [os.remove, lambda path: path.write_bytes(path.read_bytes()[:300])])
def test_a_damaged_record(run, photos, damage):
  damage(run[0] / IDENTITY)
  with pytest.raises(
    UserError, match=f'{IDENTITY}, by .* (is missing|is damaged .*): restore it, or set --accept_data'
  ):
    again(run, photos)
  assert splits(again(run, photos, accept=True)) == splits(run[1])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'class_names': np.array(['cat', 'cat'])}, 'class_names: impossible values'),
    ({'class_names': np.array(['cat', 'eel'])}, 'class_names: other values than dataset.json'),
    ({'mean': np.array([0.5, np.nan, 0.5])}, 'mean: impossible values'),
    ({'mean': np.array([0.5, 0.5, 0.5])}, 'mean: other values than dataset.json'),
    ({'mean': np.array([0.5])}, 'mean: impossible values'),
    ({'std': np.array([1.0, 0.0, 1.0])}, 'std: impossible values'),
    ({'train.ids': np.zeros(26)}, 'train.ids: impossible values'),
    ({'train.ids': np.zeros(26, np.uint64)}, 'images: other ones than dataset.json'),
    ({'test.labels': np.zeros(3, np.int32)}, 'test.labels: impossible values'),
    ({'test.labels': np.full(8, 2, np.int32)}, 'test.labels: impossible values'),
    ({'test.bound': np.zeros((2, 2), np.uint64)}, 'test.bound: impossible values'),
    ({'test.copies': np.zeros(1, np.int64)}, 'test.copies: impossible values'),
    ({'test.asked': np.array(np.inf)}, 'test.asked: impossible values'),
  ],
)
def test_a_record_of_impossible_values(run, changes, message):
  with np.load(run[0] / IDENTITY) as record:
    np.savez(run[0] / IDENTITY, **(dict(record) | changes))
  with pytest.raises(UserError) as error:
    restore_learned(run[0], channels=3)
  assert f'is damaged ({message}): restore it, or set --accept_data_changes' in str(error.value)
  assert not restore_learned(run[0], channels=3, accept_changes=True).splits


def test_a_trained_run_without_any_record(run):
  (run[0] / 'checkpoints/47').mkdir(parents=True)
  (run[0] / 'checkpoints/47/checksums.json').write_text('{}')  # Runs from before them have no record either.
  for name in (IDENTITY, 'dataset.json'):
    (run[0] / name).unlink()
  with pytest.raises(UserError, match=f'{IDENTITY}, by .* is missing: restore it, or set --accept_data_changes'):
    restore_learned(run[0], channels=3)
  assert not restore_learned(run[0], channels=3, accept_changes=True).by_position


def test_a_run_of_version_0_1_0(run, photos, caplog):
  (run[0] / IDENTITY).unlink()
  facts = json.loads((run[0] / 'dataset.json').read_text())
  del facts['fingerprints']
  (run[0] / 'dataset.json').write_text(json.dumps(facts))
  (run[0] / 'checkpoints/47').mkdir(parents=True)
  dataset = again(run, photos)
  (line,) = caplog.messages
  assert line.endswith('has no fingerprint of its images (version 0.1.0), so no change is noticed')
  # By position: version 0.1.0 drew these of the same images.
  assert {red for _, red in values(dataset.test)} == {5, 11, 14, 19, 106, 114, 115, 117}
  assert {red for _, red in values(dataset.held_out)} == {10, 12, 16, 101, 108, 116}


def test_copies_of_one_image_stay_together(photos):
  for number in range(20):
    shutil.copy(photos / f'cat/{number:02}.png', photos / f'cat/{number:02}b.png')
  dataset = load(photos)
  found = splits(dataset)
  cats = [{red for label, red in found[name] if label == 0} for name in found]
  assert not set.intersection(*cats[:2]) | set.intersection(*cats[1:]) | (cats[0] & cats[2])
  assert sum(len(getattr(dataset, name)) for name in found) == 60


def test_a_class_of_copies_is_divided():
  labels, ids = np.repeat(np.int32([0, 1]), 10), identities([b'a'] * 10 + [bytes([n]) for n in range(10)])
  chosen = drawn(choose_limits(labels, ids, 6, 'test', 6), labels, ids, 'test')
  assert [chosen[:10].sum(), chosen[10:].sum()] == [3, 3]


def test_copies_of_the_first_content_are_drawn_as_a_whole():
  """Of each content of class 0 there are 7 copies, and a quota of 3."""
  labels, ids = np.repeat(np.int32([0, 1]), 70), identities([str(n % 10 if n < 70 else n).encode() for n in range(140)])
  chosen = drawn(choose_limits(labels, ids, 6, 'held_out', 6), labels, ids, 'held_out')
  assert [chosen[:70].sum(), chosen[70:].sum()] == [7, 3] and len(set(ids[:70][chosen[:70]])) == 1


def test_held_out_copies_of_a_class_without_others_are_counted(photos, caplog):
  for path in (photos / 'cat').iterdir():
    write(path, 7)
  dataset = load(photos)
  shared = sum(red == 7 for red in dataset.held_out.images[:, 0, 0, 0])
  assert shared and any(f'held_out has {shared} images that are also in train of' in line for line in caplog.messages)


def test_one_content_in_two_classes_is_drawn_from_none_or_both():
  labels, ids = np.repeat(np.int32([0, 1]), 100), identities([str(n % 90).encode() for n in range(200)])
  chosen = drawn(choose_limits(labels, ids, 60, 'test', 60), labels, ids, 'test')
  for content in np.unique(ids):
    assert len(set(chosen[ids == content])) == 1


def test_identities_are_of_the_content_and_spread():
  ids = identities([str(number).encode() for number in range(4000)])
  assert ids.dtype == np.uint64 and len(set(ids.tolist())) == 4000
  labels = np.zeros(4000, np.int32)
  halves = [drawn(choose_limits(labels, ids, 2000, split, 0), labels, ids, split) for split in ('test', 'held_out')]
  assert [half.sum() for half in halves] == [2000, 2000]
  assert 900 < (halves[0] & halves[1]).sum() < 1100  # Independent: 1,000 in the mean, with a deviation of 16.


class Pixels:
  """Records of another package, without `read_identified`."""

  def __init__(self, reds):
    self.reds = reds

  def __len__(self):
    return len(self.reds)

  def read(self, numbers):
    images = [np.full((4, 4, 3), self.reds[number], np.uint8) for number in numbers]
    return images, np.array([self.reds[number] // 100 for number in numbers], np.int32)


def test_records_that_do_not_know_their_identities(photos, tmp_path, monkeypatch, caplog):
  reds = [*range(20), *range(100, 120)]
  monkeypatch.setattr(
    'paranet_jax.data.load._open',
    lambda *_: Source('pixels', '', ('cat', 'dog'), lambda split: Pixels(reds if split == 'train' else [30, 130])),
  )
  (tmp_path / 'run').mkdir()
  dataset = load('')
  save_learned(tmp_path / 'run', dataset)
  reds.insert(0, 50)
  found = again((tmp_path / 'run',), '')
  assert values(found.held_out) - {(0, 50)} == values(dataset.held_out) and len(caplog.messages) == 1


def test_the_present_place_of_a_run_s_images(run, photos, monkeypatch, caplog):
  shutil.move(photos, photos.with_name('moved'))
  with pytest.raises(UserError, match=f'found no folder {photos}: name it with --data_dir='):
    again(run, photos)
  monkeypatch.setenv('PARANET_DATA_DIR', str(photos.with_name('moved')))
  assert splits(again(run, photos)) == splits(run[1])
  assert caplog.messages == [
    f'{photos} does not exist: reading {photos.with_name("moved")}, which PARANET_DATA_DIR names'
  ]
  with pytest.raises(UserError, match='name it with --config.data.data_dir='):
    load(photos)  # A new run's.


def test_a_run_of_version_0_1_0_knows_its_classes_and_how_many_images(run, photos):
  (run[0] / IDENTITY).unlink()
  facts = json.loads((run[0] / 'dataset.json').read_text())
  del facts['fingerprints']
  (run[0] / 'dataset.json').write_text(json.dumps(facts | {'mean': [0.5] * 3}))
  assert again(run, photos).mean == (0.5,) * 3
  added(photos)
  with pytest.raises(UserError, match='expected the 40 images .*, found 43 in .*: version 0.1.0 drew'):
    again(run, photos)
  assert len(again(run, photos, accept=True).train) > 0
  rename('dog', 'apple')(photos)
  with pytest.raises(UserError, match="found 'apple' as class 1"):
    again(run, photos)
  assert again(run, photos, accept=True).class_names == ('cat', 'dog')


def test_members_of_an_ensemble_test_on_what_none_was_trained_on(run):
  first = restore_learned(run[0], channels=3)
  rest = Known(*(values[:3] for values in first.splits['test']))
  both = together([first, replace(first, splits=first.splits | {'train': rest}), replace(first, splits={})])
  assert set(both.splits['train'].ids) == set(first.splits['train'].ids) | set(rest.ids)
  same = together([first, first])  # As several seeds are: no image counts twice.
  assert compare(same, first.splits, 'photos') == [] and len(same.splits['train'].ids) == len(first.splits['train'].ids)
  assert together([]) is None and together([None, first]) is None


def test_the_test_images_of_an_ensemble_are_those_that_no_member_was_trained_on(run, photos):
  first = restore_learned(run[0], channels=3)
  test = first.splits['test']
  trained, left = (Known(*(values[part] for values in test)) for part in (slice(3), slice(3, None)))
  other = replace(first, splits=first.splits | {'train': trained, 'test': left})
  dataset = load(photos, together([first, other]))
  assert not set(dataset.test.identities) & set(trained.ids) and set(dataset.test.identities) == set(left.ids)


def test_a_member_of_version_0_1_0_leaves_out_the_training_images_of_the_others(run, photos):
  first = restore_learned(run[0], channels=3)
  oldest = replace(first, by_position=True, splits={}, limits={})
  alone, both = load(photos, together([oldest])), load(photos, together([oldest, first]))
  trained = set(first.splits['train'].ids)
  assert set(alone.test.identities) & trained and set(both.test.identities) == set(alone.test.identities) - trained
