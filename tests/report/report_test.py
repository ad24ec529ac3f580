"""`python -m paranet_jax.report`: what it shows, what it promises, and what it refuses."""

import base64
import dataclasses
import io
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
from markup import Structure
from PIL import Image

from paranet_jax.calibrate.figures.figure_data import figure_data
from paranet_jax.calibrate.flags import parse
from paranet_jax.early.exit_plan import CheckpointId, full_network_plan
from paranet_jax.early.logits import Outputs
from paranet_jax.early.path_costs import PathCosts
from paranet_jax.early.sentences import promises
from paranet_jax.host.errors import UserError
from paranet_jax.report import __main__ as report
from paranet_jax.report import facts as facts_lib
from paranet_jax.report.charts import budget_chart, in_page_style
from paranet_jax.report.facts import Facts, data_uri, exit_images, read_facts
from paranet_jax.report.page import exit_rows, page_values, write_page

CLASSES = ('cat', '<b>dog</b>', 'owl')
OWN = np.array([10.0, 20.0])
PLAN = dataclasses.replace(
  full_network_plan(CheckpointId('PN2', 'toy', 7, 'abc'), (1, 3), (10, 30)),
  policy='optimal',
  target={'budget': 20.0, 'unit': 'macs'},
  thresholds=(1 - np.exp(-1.0), 0.0),
  confidence_thresholds=(1.0, 0.0),
  visited=(1, 3),
  macs=(10, 30),
  splits={'temperature': 40, 'thresholds': 40, 'test': 60},
)


def outputs(seed, count):
  draw = np.random.default_rng(seed)
  labels = draw.integers(0, 3, count)
  logits = draw.normal(size=(2, count, 3)).astype(np.float32)
  logits[:, np.arange(count), labels] += np.array([[1], [2]], np.float32)
  return Outputs(logits, labels)


TEST = outputs(2, 60)
IMAGES = np.random.default_rng(3).integers(0, 256, (60, 4, 4, 3), np.uint8)


@pytest.fixture(scope='module')
def data():
  costs = PathCosts(2, lambda before, index: OWN[index] + (0 if before else OWN[:index].sum()))
  return figure_data(dataclasses.replace(PLAN, target={}), outputs(1, 40), TEST, costs, IMAGES, CLASSES)


def facts_of(folder, plan=PLAN, **changes):
  run = SimpleNamespace(image_shape=(4, 4, 3), step=7, dataset=SimpleNamespace(class_names=CLASSES))
  return dataclasses.replace(Facts(folder, False, run, plan, None, (), 'no data'), **changes)


def test_surest_images_of_each_exit():
  logits = np.full((2, 5, 3), -9.0, np.float32)
  # Image: label, gap and prediction at exit 1; the gap at exit 3 is that of the ones that continue.
  for image, (label, gap) in enumerate([(0, 5), (0, 9), (1, 0.1), (0, 7), (2, 0.2)]):
    logits[0, image, 1 if image == 3 else label] += gap
    logits[1, image, 0] += 1
  found = exit_images(PLAN, Outputs(logits, np.array([0, 0, 1, 0, 2])), IMAGES, CLASSES)
  assert [exit_.number for exit_ in found] == [1, 3]
  first, last = found
  assert [shown.source for shown in first.surest] == [data_uri(IMAGES[image]) for image in (1, 3, 0)]
  assert [(shown.label, shown.prediction) for shown in first.wrong] == [('cat', '<b>dog</b>')]
  assert first.surest[0].probability == pytest.approx(1 / (1 + 2 * np.exp(-9)), rel=1e-6)
  assert [shown.label for shown in last.wrong] == ['<b>dog</b>', 'owl'] and len(last.surest) == 2


def test_thumbnails():
  for image, kind, size in ((IMAGES[0], 'png', (4, 4)), (np.zeros((300, 300, 1), np.uint8), 'jpeg', (96, 96))):
    head, encoded = data_uri(image).split(',')
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
      assert (head, picture.size) == (f'data:image/{kind};base64', size)
      assert kind == 'jpeg' or np.array_equal(np.asarray(picture), image)


def test_the_page(tmp_path, data):
  images = exit_images(PLAN, TEST, IMAGES, CLASSES)
  line = {'step': 5, 'epoch': 0.5, 'split': 'test', 'exit_1/accuracy': 0.5, 'exit_3/accuracy': 0.6}
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
  facts = facts_of(tmp_path, data=data, images=images, lacking='')
  size = write_page(tmp_path / 'report.html', facts, 'python -m paranet_jax.report --workdir="a & b"')
  text = (tmp_path / 'report.html').read_text()
  assert size == len(text.encode()) < 3_000_000
  page = Structure(text)
  assert page.ids.count('slider') == 1 and set(page.references) <= set(page.ids)
  assert all(link.startswith(('data:', '#')) for link in page.links) and '@import' not in text
  assert '<b>dog</b>' not in text and '&lt;b&gt;dog' in text and 'a &amp; b' in text
  assert text.count('<svg') == 3 and '#010203' not in text and 'currentColor' in text
  points = json.loads(re.search(r'const points = (\[.*?\]), slider', text)[1])
  assert len(points) == 25 and points[0]['text'].startswith(
    '10 multiply-adds an image, 33.3 % of the cost of exit 3 al'
  )
  assert points[-1]['command'] == f'python -m paranet_jax.calibrate --workdir={tmp_path} --budget=' + (
    f'{data.families["optimal"]["test"].cost.max():.0f}'
  )


def test_a_path_that_is_not_utf8(tmp_path):
  place = tmp_path / os.fsdecode(b'a\xffb')
  size = write_page(place, facts_of(tmp_path), f'python -m paranet_jax.report --out={place}')
  assert size == len(place.read_bytes()) and b'/a\\udcffb' in place.read_bytes()


def test_curves_that_matplotlib_cannot_draw(tmp_path, monkeypatch):
  (tmp_path / 'metrics.jsonl').write_text('')
  monkeypatch.setattr('paranet_jax.report.charts.curves_chart', None)
  found = page_values(facts_of(tmp_path), 'command')
  assert (found['curves'], found['no_curves']) == (None, 'The figure could not be drawn.')
  (tmp_path / 'metrics.jsonl').unlink()
  assert page_values(facts_of(tmp_path), 'command')['no_curves'] == 'The run has no metrics.jsonl.'


@pytest.mark.parametrize('score', ['max_prob', 'entropy', 'margin', 'patience'])
def test_the_commands_of_the_slider_choose_its_points(tmp_path, data, score):
  facts = facts_of(tmp_path, dataclasses.replace(PLAN, score=score), data=data, lacking='')
  words = json.loads(page_values(facts, 'command')['points'])[0]['command'].split()
  request = parse(words[3:])
  assert request.score == score and request.target == {'budget': 10.0, 'unit': 'macs'}


def test_the_slider_stays_on_the_curve(data):
  chart, points = in_page_style(budget_chart)(data)
  width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', chart).groups())
  assert all(0 < point.x < width and 0 < point.y < height for point in points)
  path = re.findall(r'<path d="([^"]*)"[^>]*stroke: #d55e00; stroke-width[^>]*linecap: square', chart)[
    0
  ]  # Before the one in the legend.
  drawn = np.array([list(map(float, pair)) for pair in re.findall(r'[ML] ([\d.]+) ([\d.]+)', path)])
  places = np.array([(point.x, point.y) for point in points])
  gaps = np.abs(drawn[:, None] - places).sum(-1)  # Points in between may be left out of the drawing.
  assert gaps.min(axis=1).max() < 0.01
  np.testing.assert_allclose(drawn.min(axis=0), places.min(axis=0), atol=0.01)
  np.testing.assert_allclose(drawn.max(axis=0), places.max(axis=0), atol=0.01)


def test_without_the_data_set(tmp_path):
  values = page_values(facts_of(tmp_path), 'command')
  assert (values['budget'], values['reliability'], values['curves']) == (None, None, None)
  write_page(tmp_path / 'report.html', facts_of(tmp_path, bundle=True), 'command')
  text = (tmp_path / 'report.html').read_text()
  Structure(text)
  assert 'They need the data set, which could not be read: no data' in text and '<script>' not in text
  assert 'A bundle has no log of its training.' in text and 'paranet_jax.predict' not in text


def test_table_of_exits(tmp_path, data):
  now = exit_rows(facts_of(tmp_path, data=data))
  taken = data.shares['test']
  assert [row[:2] for row in now] == [('1', '10'), ('3', '30')]
  assert [row[3] for row in now] == ['probability 0.6321', 'the rest']
  assert [row[4] for row in now] == [f'{100 * share:.2f} %' for share in taken]
  recorded = {'exit_accuracy': [0.5, 0.75], 'shares': [1.0, 0.0], 'exits': [{'accuracy': 0.5}, {'accuracy': None}]}
  plan = dataclasses.replace(PLAN, test=recorded, ms=(0.5, 1.25))
  assert exit_rows(facts_of(tmp_path, plan, data=data)) == [
    ('1', '10', '50.00 %', 'probability 0.6321', '100.00 %', '50.00 %', '0.500'),
    ('3', '30', '75.00 %', 'the rest', '0.00 %', '—', '1.250'),
  ]
  assert exit_rows(facts_of(tmp_path))[1] == ('3', '30', '—', 'the rest', '—', '—')
  for changes, words in (
    ({'thresholds': (None, 0.0), 'confidence_thresholds': (None, 0.0)}, 'no image'),
    ({'thresholds': (0.0, 0.0), 'confidence_thresholds': (0.0, 0.0)}, 'all images'),
    ({'thresholds': (1 - np.exp(-12.0), 0.0), 'confidence_thresholds': (12.0, 0.0)}, 'probability 1 - 6.1e-06'),
    ({'score': 'patience', 'thresholds': (2.0, 0.0), 'confidence_thresholds': (2.0, 0.0)}, '2 equal answers'),
    ({'score': 'margin', 'thresholds': (0.25, 0.0)}, 'margin 0.2500'),
  ):
    assert [row[3] for row in exit_rows(facts_of(tmp_path, dataclasses.replace(PLAN, **changes)))] == [
      words,
      'the rest',
    ]


AUDIT = {
  'images': 50,
  'within': 8,
  'most_macs': 40.0,
  'corruptions': [{}, {}],
  'clean': {'cost_macs': 16.0},
  'hardest': {'name': 'blur', 'cost_macs': 24.0},
  'attack': {'cost_macs': 32.0},
}


def test_costs_that_were_measured(tmp_path):
  latency = {'device': 'cpu', 'batch_sizes': [], 'energy': ['package-0', 'package-1']}
  measured = {'cost_macs': 15.0, 'cost_ms': 0.75, 'cost_joules': 0.01234}
  plan = dataclasses.replace(
    PLAN, ms=(0.5, 1.25), joules=(0.004, 0.02), latency=latency, expected=None, test=measured, audit=AUDIT
  )
  values = page_values(facts_of(tmp_path, plan), 'command')
  assert values['headers'][-2:] == ('ms', 'joules')
  assert [row[-2:] for row in values['rows']] == [('0.500', '0.004'), ('1.250', '0.02')]
  assert values['measures'][1:] == [
    ('mean of test images', '15 multiply-adds, 50.0 % of it'),
    ('mean of test images', '0.750 ms'),
    ('mean of test images', '0.0123 joules'),
    ('mean with blur', '24 multiply-adds, 1.50 times that of 50 test images'),
    ('mean under a slowdown attack', '32 multiply-adds, 2.00 times that of 50 test images'),
    ('milliseconds were measured on', 'cpu'),
    ('joules were measured by', 'package-0, package-1; all programs and idle power count'),
  ]
  assert values['promises'][-1] == (
    'Harder images cost more. Of 2 corruptions of 50 test images, the worst (blur) makes the mean 1.50 times as high, '
    'and an adversary who changes pixels by 8 of 255 at most makes it 2.00 times as high: the speed-up falls from 1.88 '
    'to 1.25 and 0.94.'
  )
  without = dataclasses.replace(plan, latency={'device': 'gpu', 'batch_sizes': []}, provenance={'cpu': 'own'})
  assert page_values(facts_of(tmp_path, without), 'command')['measures'][-1] == ('milliseconds were measured on', 'own')
  joules = dataclasses.replace(PLAN, target={'budget': 0.05, 'unit': 'joules', 'batch_size': 1})
  assert 'cost a mean of 0.05 joules at most' in promises(joules)[0]


@pytest.mark.parametrize(('calibrated', 'promised'), [('float32', False), ('int8', True), (None, True)])
def test_a_bundle_in_another_dtype_than_was_calibrated_promises_nothing(tmp_path, calibrated, promised):
  (tmp_path / 'bundle.json').write_text(json.dumps({'dtype': 'int8', 'calibrated_dtype': calibrated}))
  of_run, of_bundle = (page_values(facts_of(tmp_path, bundle=kind), 'command')['promises'] for kind in (False, True))
  first = (
    'This was promised of the network in float32. The bundle is in int8, and nothing is promised of it. All figures '
    'here are of the network in float32, too.'
  )
  assert of_bundle == (of_run if promised else [first, *of_run])


def test_the_watch_of_a_bundle(tmp_path):
  plan = dataclasses.replace(PLAN, seen={})
  for bundle, watched in ((True, True), (False, False)):
    sentence = page_values(facts_of(tmp_path, plan, bundle=bundle), 'command')['promises'][-1]
    assert sentence.startswith('run.py --watch=STATE.json tests whether answers') == watched


ALIKE = 'This assumes that new images are drawn like the held-out ones: not from another camera, place or season.'


@pytest.mark.parametrize(
  'changes, sentences',
  [
    ({'policy': 'full', 'target': {}}, ['Nothing was calibrated: every image goes to exit 3, at its full cost.']),
    (
      {'test': {'cost_macs': 19.0}},
      [
        'Thresholds were chosen so that the 40 held-out images cost a mean of 20 multiply-adds at most. New ones '
        'should cost about as much; no bound is promised.',
        'A single image costs at most 30 multiply-adds.',
        'On 60 test images, which chose nothing, the mean was 19 multiply-adds.',
      ],
    ),
    (
      {'policy': 'ltt', 'target': {'risk': 0.02, 'delta': 0.05, 'loss': 'gap'}, 'test': {'gap': 0.0151}},
      [
        'With probability 0.95 over the draw of the 40 held-out images, at most 2 % of new images lose their answer by '
        'exiting early (wrong where the last exit is right).',
        'On 60 test images, which chose nothing, of all it was 1.51 %.',
        ALIKE,
      ],
    ),
    (
      {'policy': 'crc', 'target': {'risk': 0.02, 'loss': 'disagreement'}},
      [
        'On average over the draw of the 40 held-out images, at most 2 % of new images lose their answer by exiting '
        'early (answer differs from the last exit).',
        ALIKE,
      ],
    ),
    (
      {'policy': 'shared', 'target': {'threshold': 0.9}},
      [
        'Thresholds were set by hand: no mean cost and no accuracy is promised.',
        'A single image costs at most 30 multiply-adds.',
      ],
    ),
  ],
)
def test_promises(changes, sentences):
  assert promises(dataclasses.replace(PLAN, **changes)) == sentences


def test_promises_of_answers():
  plan = dataclasses.replace(
    PLAN,
    policy='shared',
    target={'threshold': 0.9},
    splits={'promises': 20, 'test': 60},
    reject={'risk': 0.02, 'delta': 0.1},
    sets={'coverage': 0.9},
    test={'answered': 0.9, 'answered_error': 0.0123, 'covered': 0.91},
  )
  on_test = 'On 60 test images, which chose nothing,'
  assert promises(plan)[2:] == [
    'Images of which the network is too unsure are answered "unknown". With probability 0.9 over the draw of 20 other '
    'held-out images, at most 2 % of the answers to all other new images are wrong.',
    f'{on_test} 90 % were answered.',
    f'{on_test} 1.23 % of the answers were wrong.',
    'The set of classes of a new image holds the right one with a probability of at least 90 %, at whichever exit it '
    'leaves.',
    f'{on_test} 91 % of the sets held it.',
    ALIKE,
  ]


@pytest.mark.parametrize(
  ('limits', 'thresholds', 'together'),
  [
    ((0.1, 0.2, 0.3), (1.0, 2.0, 0.0), ''),
    ((0.1, 0.1, 0.3), (1.0, 2.0, 0.0), '; exits 1 and 2 share a limit, and keep it together'),
    ((0.1, 0.1, 0.1), (1.0, 2.0, 0.0), '; exits 1, 2 and 4 share a limit, and keep it together'),
    ((0.1, 0.1, 0.3), (None, 2.0, 0.0), ''),  # No image leaves at exit 1.
    ((None, None, 0.3), (1.0, 2.0, 0.0), ''),  # All classes are in the sets.
  ],
)
def test_sets_of_exits_that_share_a_limit(limits, thresholds, together):
  plan = full_network_plan(CheckpointId('PN4', 'toy', 7, 'abc'), (1, 2, 4), (10, 20, 30))
  plan = dataclasses.replace(
    plan,
    policy='shared',
    target={'threshold': 0.9},
    sets={'coverage': 0.9, 'limits': list(limits)},
    confidence_thresholds=thresholds,
    macs=(10, 20, 30),
  )
  assert promises(plan)[2:] == [
    'The set of classes of a new image holds the right one with a probability of at least 90 %, at whichever exit it '
    f'leaves{together}.',
    ALIKE,
  ]


@pytest.mark.parametrize(
  'flags, message',
  [
    ('', 'expected --workdir of a run or --bundle, found neither; set one of them'),
    ('--workdir={here} --bundle={here}', 'expected --workdir of a run or --bundle, found both; set one of them'),
    ('--bundle={here}', 'expected a bundle with a bundle.json in {here}, found none; set --bundle'),
    (
      '--workdir={here} --out={here}',
      'expected a file in a writable folder as the report, found {here}; set --out',
    ),
    (
      '--workdir={here} --out={here}/no/report.html',
      'expected a file in a writable folder as the report, found {here}/no/report.html; set --out',
    ),
    ('--workdir={here}', 'expected a run with a config.json in {here}, found none; set --workdir'),
    ('--workdir={here}/no', 'expected a run with a config.json in {here}/no, found none; set --workdir'),
    ('--workdir={here} --top', 'unrecognized arguments: --top; see --help'),
  ],
)
def test_refusals(tmp_path, capsys, flags, message):
  assert report.main(flags.format(here=tmp_path).split()) == 2
  assert capsys.readouterr().err == f'error: {message.format(here=tmp_path)}\n'
  assert not list(tmp_path.iterdir())


def test_another_file_is_not_replaced(tmp_path, capsys):
  (tmp_path / 'config.json').write_text('{}')
  assert report.main([f'--workdir={tmp_path}', f'--out={tmp_path}/config.json']) == 2
  assert capsys.readouterr().err == (
    f'error: expected an earlier report or nothing at {tmp_path}/config.json, found another file; set --out\n'
  )
  assert (tmp_path / 'config.json').read_text() == '{}'


def test_without_jinja2(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(report.importlib.util, 'find_spec', lambda name: None)
  assert report.main([f'--workdir={tmp_path}']) == 2
  assert capsys.readouterr().err == 'error: a report needs jinja2, found none; pip install jinja2\n'


def test_a_run_on_its_data_set(finished_run, capsys, tmp_path):
  facts = read_facts(finished_run, False, None, False, tmp_path / 'report.html')
  assert capsys.readouterr().out.splitlines()[-1] == 'reading 300 held-out and 360 test images'
  summary = json.loads((finished_run / 'summary.json').read_text())
  # Nothing was calibrated: every image goes to the last exit.
  assert (facts.lacking, facts.plan.policy, facts.plan.exits) == ('', 'full', (2, 3))
  assert facts.data.shares['test'].tolist() == [0, 1] and facts.data.ms is None
  for split, rows in (('test', summary['exits']), ('held_out', summary['held_out'])):
    assert facts.data.accuracy[split].tolist() == pytest.approx([row['accuracy'] for row in rows[1:]])
    assert facts.data.chosen[split].accuracy == pytest.approx(rows[-1]['accuracy'])
    assert facts.data.chosen[split].cost == summary['exits'][-1]['macs_alone']
  (shown,) = facts.images
  assert shown.number == 3 and len(shown.surest) == len(shown.wrong) == 6
  assert all(image.label != image.prediction for image in shown.wrong)
  surest = [image.probability for image in shown.surest]
  assert surest == sorted(surest, reverse=True) and surest[0] > 0.99


@pytest.mark.parametrize(('held_out', 'test'), [(None, [0]), ([], [0]), ([0], [])])
def test_a_split_without_images(tmp_path, monkeypatch, held_out, test):
  run = facts_of(tmp_path).run
  run.plan, run.load_dataset = PLAN, lambda *_: SimpleNamespace(held_out=held_out, test=test)
  monkeypatch.setattr(facts_lib, 'load', lambda folder: run)
  facts = read_facts(tmp_path, False, None, False, tmp_path / 'report.html')
  assert (facts.data, facts.images) == (None, ())
  assert facts.lacking == (
    'expected held-out and test images, found none of one kind; train with --config.data.held_out'
  )


def test_the_command_says_what_is_lacking(tmp_path, capsys, monkeypatch):
  run = facts_of(tmp_path).run
  run.plan = PLAN
  monkeypatch.setattr(facts_lib, 'load', lambda folder: run)

  def missing(*_):
    raise UserError('expected toy, found none; set --config.data.data_dir')

  monkeypatch.setattr(facts_lib, '_dataset', missing)
  assert report.main([f'--workdir={tmp_path}', f'--out={tmp_path}/own.html']) == 0
  assert (tmp_path / 'own.html').read_bytes().startswith(facts_lib.HEAD)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == (
    'without the data set, so without budgets, reliability and images: expected toy, found none; set --data_dir'
  )
  assert re.fullmatch(rf'report: {tmp_path}/own\.html, 0\.\d\d MB', lines[1])
  monkeypatch.setattr(facts_lib, 'is_bundle', lambda folder: True)
  assert report.main([f'--bundle={tmp_path}']) == 0
  line = capsys.readouterr().out.splitlines()[0]
  assert line.endswith('reliability and images: a bundle does not say where it is; set --data_dir')
