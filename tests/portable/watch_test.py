"""The watch for drift: its p-values one by one, false alarms in many runs, changes that it finds, and its state."""

import json
import types

import numpy as np
import pytest

from paranet_jax.portable import run
from paranet_jax.portable.run import BundleError, Predictions, Watch

CLASSES, IMAGES = 6, 600
EDGES = [[0.25, 0.5, 0.75], [0.5], []]


def draw(rng, count, exits=(0.5, 0.3, 0.2), tired=0.0, prior=None):
  """Answers: exits 1 to 3, largest probabilities, and classes."""
  tops = np.clip(rng.beta(2, 1, count) - tired, 0, 1)
  return rng.choice([1, 2, 3], count, p=exits), tops, rng.choice(CLASSES, count, p=prior)


def seen(exits, tops, classes, wrong=60):
  places = [np.searchsorted(edges, tops[exits == k + 1], side='right') for k, edges in enumerate(EDGES)]
  counts = [np.bincount(each, minlength=len(edges) + 1).tolist() for each, edges in zip(places, EDGES, strict=True)]
  classes = np.bincount(classes, minlength=CLASSES).tolist()
  return {'images': len(exits), 'edges': EDGES, 'counts': counts, 'classes': classes, 'wrong': wrong}


def bundle(known, rejects=False):
  macs = {1: 10, 2: None, 3: 40}
  return types.SimpleNamespace(_seen=known, _identity=[0.5], exits=(1, 2, 3), macs=macs, rejects=rejects)


def watch(rng, path=None, alpha=0.01, wrong=60):
  return Watch(bundle(seen(*draw(rng, IMAGES), wrong)), path, alpha)


def rows(answers):
  return list(zip(*(column.tolist() for column in answers), strict=True))


def fed(found, rng, count, **change):
  found.add(rows(draw(rng, count, **change)))
  found.flush()
  return found


def test_the_bets_one_by_one(monkeypatch):
  """Two blocks, with the ranks and the capital computed by definition, image by image."""
  rng, counts = np.random.default_rng(0), np.array([5, 2, 3])
  gambler = run._Gambler([counts])
  before = [0] * 5 + [1] * 2 + [2] * 3
  active, reserve, remembered = [0.5] * 3, 0.5, [np.zeros(8) for _ in range(3)]
  for block in range(2):
    categories = rng.integers(0, 3, 40)
    chance = np.random.default_rng((block, 10 + 40 * block)).random((1, 40))[0]
    gambler.bet([categories])
    if block:
      share = 1 / (3 * np.log(3))
      active, reserve = [each + reserve * share for each in active], reserve * (1 - share)
    hits = np.zeros(8)
    for category, u in zip(categories, chance, strict=True):
      more, equal = sum(each > category for each in before), sum(each == category for each in before) + 1
      place = int(8 * (more + u * equal) / (len(before) + 1))
      active = [each * 8 * (bins[place] + 3) / (bins.sum() + 24) for each, bins in zip(active, remembered, strict=True)]
      before.append(category)
      hits[place] += 1
    remembered = [bins * np.exp(-40 / memory) + hits for bins, memory in zip(remembered, (100, 800, 6400), strict=True)]
  assert gambler.log_capital == pytest.approx(np.log(np.mean(active) + reserve))


def test_ranks_among_many_classes():
  """Categories above 32,767: how many of those before each are later, and equal, counted one by one."""
  categories = 40_000
  rng = np.random.default_rng(0)
  counts, block = np.ones(categories, int), rng.choice([5, 32_767, 32_768, 39_999], 40)
  above, equal = run._Gambler([counts])._count(block[None])
  before = [[*range(categories), *block[:place]] for place in range(40)]
  assert above[0].tolist() == [sum(each > block[place] for each in before[place]) for place in range(40)]
  assert equal[0].tolist() == [before[place].count(block[place]) for place in range(40)]


def test_few_runs_without_a_change_alarm():
  # Each of two tests may alarm in a tenth of the runs; the classes are wrong as often as before.
  alarms = []
  for seed in range(150):
    rng = np.random.default_rng(seed)
    found = fed(watch(rng, alpha=0.2), rng, 1280)
    alarms.append(found.alarm is not None)
  assert np.mean(alarms) <= 0.1 + 3 * np.sqrt(0.09 / 150)


CHANGES = {
  'later exits': {'exits': (0.3, 0.35, 0.35)},
  'less sure': {'tired': 0.2},
  'other classes': {'prior': (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)},
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('clean', [0, 5000])
def test_changes_are_found(change, clean):
  rng = np.random.default_rng(1)
  found = fed(watch(rng), rng, clean)
  assert found.alarm is None and found.images == clean
  fed(found, rng, 3000, **CHANGES[change])
  assert found.alarm and found.alarm.test == 'answers' and clean < found.alarm.images <= clean + 3000
  assert found.evidence >= 200
  images = found.images
  fed(found, rng, 500)
  assert found.images == images  # Nothing is tested any more.


def test_what_an_alarm_says():
  rng = np.random.default_rng(2)
  found = watch(rng)
  assert found.line() == 'no drift in 0 images'
  fed(found, rng, 1280, exits=(0.0, 0.0, 1.0))
  assert found.alarm.shares == {1: 0.0, 2: 0.0, 3: 1.0} and found.alarm.macs == 40
  assert found.line() == (
    f'drift: after {found.alarm.images} images, answers differ from those that calibration saw '
    '(a false alarm has a probability of at most 0.01); lately exit 1: 0.0 %, exit 2: 0.0 %, exit 3: 100.0 %, '
    '40 multiply-adds an image; look at the images, and calibrate again'
  )


@pytest.mark.parametrize(('rate', 'alarms'), [(0.1, False), (0.3, True)])
def test_labels_test_the_errors(rate, alarms):
  rng = np.random.default_rng(3)
  found = watch(rng)  # A tenth of the answers was wrong.
  for wrong in rng.random(1500) < rate:
    found.record(1 if wrong else 0, run.Prediction(0, np.zeros(CLASSES), 1, 10))
  found.record(1, run.Prediction(CLASSES, np.zeros(CLASSES), 1, 10))  # Unknown, and so not wrong.
  found.flush()
  assert (found.alarm is not None) == alarms and found.images == 0
  if alarms:
    assert found.alarm.test == 'errors' and 'answers are not wrong as often as' in found.line()


def test_errors_are_those_of_the_answered_images():
  """With --reject: half of the images are unknown, of which half are wrong; of the others a tenth."""
  rng, unknown = np.random.default_rng(7), run.Prediction(CLASSES, np.zeros(CLASSES), 3, 40)
  known = seen(*draw(rng, IMAGES), wrong=30) | {'answered': 300}
  found = Watch(bundle(known, rejects=True))
  assert found._errors._counts.tolist() == [[270, 30]]
  for wrong in rng.random(2000) < 0.1:
    found.record(1 if wrong else 0, run.Prediction(0, np.zeros(CLASSES), 1, 10))
    found.record(1, unknown)
  found.flush()
  assert found.alarm is None and found.labeled == 2000
  uncounted = Watch(bundle(seen(*draw(rng, IMAGES)), rejects=True))
  assert not uncounted.takes_labels
  with pytest.raises(BundleError, match='or one with --reject that did not count the answered images; leave out the'):
    uncounted.record(1, unknown)


def test_the_label_of_the_last_image():
  rng = np.random.default_rng(4)
  found = watch(rng)
  probabilities = np.eye(CLASSES, dtype=np.float32)[[2, 4]]
  with pytest.raises(ValueError, match='^expected an answer before its label, found none'):
    found.record(4)
  found.see(Predictions(np.array([2, 4]), probabilities, np.array([1, 3]), np.array([10, 40])))
  found.record(4)
  found.record(2)
  assert found._pending_errors == [0, 1] and found.labeled == 2 and found.takes_labels
  found.see(Predictions(np.array([2, CLASSES]), probabilities, np.array([1, 3]), np.array([10, 40])))
  found.record(4)  # It was unknown.
  assert found._pending_errors == [0, 1] and found.labeled == 2
  unlabeled = watch(rng, wrong=None)
  assert not unlabeled.takes_labels
  with pytest.raises(BundleError, match='found a run without labels'):
    unlabeled.record(1)


def test_images_without_an_answer_are_not_seen():
  """Calibration leaves images whose logits are not finite out, too."""
  found, odd = watch(np.random.default_rng(6)), np.full((1, CLASSES), np.nan, np.float32)
  sure = np.eye(CLASSES, dtype=np.float32)[[1]]
  for probabilities in (sure, odd, np.concatenate([sure, odd])):
    count = len(probabilities)
    found.see(Predictions(np.ones(count, int), probabilities, np.full(count, 3), np.full(count, 40)))
  found.record(1)  # Of the last one, which has no answer.
  found.flush()
  assert (found.images, found.labeled) == (2, 0) and found._recent.tolist() == [0, 0, 2]


def test_a_restart_continues(tmp_path):
  rng, path = np.random.default_rng(5), tmp_path / 'state.json'
  known, answers = bundle(seen(*draw(rng, IMAGES))), rows(draw(rng, 1024, exits=(0.45, 0.3, 0.25)))
  whole = Watch(known)
  whole.add(answers)
  for first in range(0, 1024, 256):
    part = Watch(known, path)
    assert part.images == first
    part.add(answers[first : first + 256])
    part.flush()
  assert part.evidence == pytest.approx(whole.evidence) and part.evidence != 1
  np.testing.assert_allclose(part._recent, whole._recent)
  assert [each.name for each in tmp_path.iterdir()] == ['state.json']
  fed(part, rng, 3000, exits=(0.0, 0.0, 1.0))
  again = Watch(known, path)
  assert again.alarm == part.alarm and again.alarm and again.line() == part.line()


def test_one_process_at_a_time_has_a_state(tmp_path):
  rng, path = np.random.default_rng(5), tmp_path / 'state.json'
  known = bundle(seen(*draw(rng, IMAGES)))
  first, second = Watch(known, path), Watch(known, path)
  message = r'^expected .*state.json as this watch has written it, found the state of another process; let one '
  with pytest.raises(BundleError, match=message):
    first.flush()
  fed(second, rng, 3000, exits=(0.0, 0.0, 1.0))
  written = path.read_text()
  first.add(rows(draw(rng, 128)))
  with pytest.raises(BundleError, match=message):
    first.flush()
  assert path.read_text() == written and Watch(known, path).alarm == second.alarm is not None
  path.unlink()  # To start again.
  first.flush()
  assert Watch(known, path).images == 128


def test_the_state_is_saved_now_and_then(tmp_path):
  rng = np.random.default_rng(6)
  found = watch(rng, tmp_path / 'state.json')
  saved = []
  for _ in range(12):
    found.add(rows(draw(rng, 128)))
    saved.append(json.loads((tmp_path / 'state.json').read_text())['images'])
  assert saved == [0] * 7 + [1024] * 5


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{', '{path} is not the state of a watch; remove it to start again, or set --watch to another file'),
    ('[]', '{path} is not the state of a watch; remove it to start again, or set --watch to another file'),
    ({'images': 'many'}, '{path} is not the state of a watch; '),
    ({'answers': {}}, '{path} is not the state of a watch; '),
    ({'alarm': {'images': 1}}, '{path} is not the state of a watch; '),
    ({'recent': [1.0]}, '{path} is not the state of a watch; '),
    (
      {'identity': 'another'},
      '{path} is the state of another bundle, calibration or --alpha; remove it to start again, or set --watch to ',
    ),
  ],
)
def test_states_that_are_refused(tmp_path, content, message):
  rng, path = np.random.default_rng(7), tmp_path / 'state.json'
  watch(rng, path)
  before = json.loads(path.read_text())
  path.write_text(content if isinstance(content, str) else json.dumps(before | content))
  written = path.read_text()
  with pytest.raises(BundleError) as error:
    watch(np.random.default_rng(7), path)
  assert str(error.value).startswith(message.format(path=path)) and path.read_text() == written


@pytest.mark.parametrize(
  ('place', 'value'),
  [
    *((('answers', part, 0, 0), value) for part in ('counts', 'active') for value in (np.nan, np.inf, 10**400)),
    *((('answers', part, 0, 0), -1) for part in ('counts', 'bins')),
    *((('answers', 'reserve'), value) for value in (np.nan, -np.inf, 'many')),
    *(((*parents, name), -1) for parents, name in ((('errors',), 'blocks'), ((), 'images'), ((), 'labeled'))),
    *(((name,), value) for name in ('images', 'labeled') for value in (np.nan, np.inf, 0.5)),
    *((('recent', 0), value) for value in (np.nan, np.inf, -1)),
    *((('alarm', 'images'), value) for value in (np.nan, -1)),
    (('alarm', 'test'), 'else'),
    *((('alarm', 'macs'), value) for value in (np.nan, 'many')),
    (('alarm', 'shares', '1'), np.nan),
    (('alarm', 'shares', '4'), 0.5),
  ],
)
def test_numbers_that_no_watch_has(tmp_path, place, value):
  rng, path = np.random.default_rng(7), tmp_path / 'state.json'
  fed(watch(rng, path), rng, 1280, exits=(0.0, 0.0, 1.0))
  state = parent = json.loads(path.read_text())
  for part in place[:-1]:
    parent = parent[part]
  while isinstance(parent, list) and isinstance(parent[0], list):
    parent = parent[0]
  parent[place[-1]] = value
  path.write_text(json.dumps(state))
  with pytest.raises(BundleError, match='state.json is not the state of a watch; remove it to start again'):
    watch(np.random.default_rng(7), path)


def test_other_refusals(tmp_path):
  rng = np.random.default_rng(8)
  with pytest.raises(BundleError, match='^expected what calibration saw in exits.json, found none; '):
    Watch(bundle(None))
  with pytest.raises(BundleError, match='^expected an alpha between 0 and 1, found 1; set --alpha'):
    watch(rng, alpha=1)
  with pytest.raises(BundleError, match=r'cannot be written \(No such file or directory\); set --watch to'):
    watch(rng, tmp_path / 'none/state.json')
  with pytest.raises(BundleError, match=r'cannot be read \(Is a directory\); set --watch to another file'):
    watch(rng, tmp_path)


def test_an_alarm_that_cannot_be_saved_is_told(tmp_path, capsys):
  rng, path = np.random.default_rng(5), tmp_path / 'state.json'
  found = watch(rng, path)
  watching = run._Watching(found, 'safe')
  path.unlink()
  path.mkdir()
  answers = np.full((2000, CLASSES), 1 / CLASSES, np.float32)
  with pytest.raises(BundleError, match='state.json cannot be read'):
    watching.see(Predictions(np.zeros(2000, int), answers, np.full(2000, 3), np.full(2000, 40)), last=True)
  assert capsys.readouterr().err == f'{found.line()}; no image exits early now\n'
