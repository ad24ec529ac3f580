"""Bundles whose files are missing, damaged, or changed with their checksums: one line each."""

import hashlib
import json
import os
import shutil

import numpy as np
import onnx
import pytest
import tiny_bundle
from PIL import Image

from paranet_jax.portable import run

IMAGES = np.random.default_rng(3).integers(0, 256, (4, 8, 8, 3), np.uint8)
NAN = float('nan')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  return tiny_bundle.write(tmp_path_factory.mktemp('whole') / 'bundle')


@pytest.fixture
def folder(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / 'bundle')


def read(folder, name='bundle.json'):
  return json.loads((folder / name).read_text())


def seal(folder, name, content):
  """Replaces a file, and its checksum with it."""
  content = content if isinstance(content, bytes) else json.dumps(content).encode()
  (folder / name).write_bytes(content)
  if name == 'bundle.json':
    return
  bundle = read(folder)
  bundle['checksums'][name] = hashlib.sha256(content).hexdigest()
  (folder / 'bundle.json').write_text(json.dumps(bundle))


def refusal(folder):
  with pytest.raises(run.BundleError) as error:
    run.load(folder)
  assert '\n' not in str(error.value)
  return str(error.value).replace(f'{folder}/', '').replace(str(folder), 'FOLDER')


def write(name, content):
  return lambda folder: (folder / name).write_text(content)


def sealed(name, content):
  return lambda folder: seal(folder, name, content)


def in_place_of(name, make):
  def change(folder):
    (folder / name).unlink()
    make(folder / name)

  return change


AGAIN = '; copy or export the bundle again'
FILES = {
  'version': (
    write('bundle.json', '{"schema_version": 2}'),
    'expected bundle.json of schema_version 1, found 2; use the run.py of that bundle',
  ),
  'no object': (write('bundle.json', '[]'), f'bundle.json is not a JSON object (it holds []){AGAIN}'),
  'no JSON': (write('bundle.json', '{'), 'bundle.json is not a JSON object (Expecting '),
  'nested': (write('bundle.json', '[' * 10**5), 'bundle.json is not a JSON object (maximum recursion depth'),
  'no text': (in_place_of('bundle.json', lambda path: path.write_bytes(b'\xff')), 'bundle.json is not a JSON object ('),
  'no list': (sealed('classes.json', b'{'), 'classes.json is not a JSON list (Expecting '),
  'no fields': (write('bundle.json', '{"schema_version": 1}'), f'bundle.json lacks formats{AGAIN}'),
  'no bundle': (
    lambda folder: (folder / 'bundle.json').unlink(),
    'expected a bundle with a bundle.json in FOLDER, found none; set --bundle',
  ),
  'no stage': (
    lambda folder: (folder / 'stage_2.onnx').unlink(),
    f'expected stage_2.onnx, found none{AGAIN}',
  ),
  'cut stage': (
    lambda folder: (folder / 'stage_1.onnx').write_bytes((folder / 'stage_1.onnx').read_bytes()[:-1]),
    'stage_1.onnx is not what was exported: expected sha256 ',
  ),
  'other exits': (write('exits.json', '{}'), 'exits.json is not what was exported: expected sha256 '),
  'folder': (in_place_of('stage_2.onnx', os.mkdir), f'stage_2.onnx cannot be read (Is a directory){AGAIN}'),
  'folder for bundle.json': (
    in_place_of('bundle.json', os.mkdir),
    f'bundle.json cannot be read (Is a directory){AGAIN}',
  ),
  'pipe': (in_place_of('stage_2.onnx', os.mkfifo), f'stage_2.onnx cannot be read (not a regular file){AGAIN}'),
  'pipe for bundle.json': (
    in_place_of('bundle.json', os.mkfifo),
    f'bundle.json cannot be read (not a regular file){AGAIN}',
  ),
  'device': (
    in_place_of('exits.json', lambda path: path.symlink_to('/dev/zero')),
    f'exits.json cannot be read (not a regular file){AGAIN}',
  ),
  'huge': (
    in_place_of('exits.json', lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40)),
    f'exits.json cannot be read (File too large){AGAIN}',
  ),
  'no model': (sealed('stage_2.onnx', b'no stage'), f'stage_2.onnx is not an ONNX model{AGAIN}'),
  'a field number of more than 64 bits': (
    sealed('stage_2.onnx', b'\xff' * 10 + b'\1'),
    f'stage_2.onnx is not an ONNX model{AGAIN}',
  ),
  'empty model': (sealed('stage_2.onnx', b''), 'onnxruntime cannot load stage_2.onnx ('),
}


@pytest.mark.parametrize('name', FILES)
def test_files(folder, name):
  damage, message = FILES[name]
  damage(folder)
  assert refusal(folder).startswith(message)


SETS = {'coverage': 0.9, 'penalty': 0, 'free': 1, 'limits': [0.1, 0.3, None], 'anytime': 0.5}
SEEN = {
  'images': 10,
  'edges': [[], [0.5], []],
  'counts': [[2], [3, 3], [2]],
  'classes': [2, 2, 2, 2, 2],
  'wrong': None,
}
# Name: (file, field, value).
FIELDS = {
  'formats': ('bundle.json', 'formats', 'onnx'),
  'no checksums': ('bundle.json', 'checksums', None),
  'a boolean for a number': ('bundle.json', 'num_classes', True),
  'no stages': ('bundle.json', 'stages', {}),
  'a text for a stage': ('bundle.json', 'stages', {'stage_1': 'stage_1.onnx'}),
  'too few stages': ('bundle.json', 'visited_stages', ['stage_1']),
  'unknown stages': ('bundle.json', 'all_stages', ['stage_1', 'stage_2', 'stage_4']),
  'one stage for three exits': ('bundle.json', 'all_stages', ['stage_1'] * 3),
  'reversed stages': ('bundle.json', 'all_stages', ['stage_3', 'stage_2', 'stage_1']),
  'too few macs': ('bundle.json', 'all_macs', [1]),
  'text for macs': ('bundle.json', 'all_macs', [1, 2, '3']),
  'decreasing macs of all stages': ('bundle.json', 'all_macs', [3, 2, 1]),
  'reversed exits': ('exits.json', 'exits', [3, 2, 1]),
  'no exits': ('exits.json', 'exits', []),
  'exit 0': ('exits.json', 'exits', [0, 1, 2]),
  'unknown exits': ('exits.json', 'visited', [1, 2, 4]),
  'without the last exit': ('exits.json', 'visited', [1, 2]),
  'unknown score': ('exits.json', 'score', 'maxprob'),
  'NaN temperature': ('exits.json', 'temperatures', [1.0, NAN, 1.0]),
  'zero temperature': ('exits.json', 'temperatures', [1.0, 0, 1.0]),
  'negative temperature': ('exits.json', 'temperatures', [1.0, -1.0, 1.0]),
  'infinite temperature': ('exits.json', 'temperatures', [1.0, float('inf'), 1.0]),
  'too many temperatures': ('exits.json', 'temperatures', [1.0] * 4),
  'NaN threshold': ('exits.json', 'confidence_thresholds', [NAN, 1.0, 0.0]),
  'another threshold': ('exits.json', 'thresholds', [0.6, 0.5, 0.0]),
  'one threshold more': ('exits.json', 'thresholds', [0.6, 0.6, None]),
  'thresholds of two exits': ('exits.json', 'thresholds', [0.6, 0.6]),
  'no last threshold': ('exits.json', 'confidence_thresholds', [1, 1, 1]),
  'negative macs': ('exits.json', 'macs', [-1, 2, 3]),
  'decreasing macs': ('exits.json', 'macs', [9, 2, 3]),
  'no macs': ('exits.json', 'macs', [None, 2, 3]),
  'a rejection without its promise': ('exits.json', 'reject', {'confidence_threshold': 1.0}),
  'a rejection of every answer': ('exits.json', 'reject', {'risk': 0, 'delta': 0.1, 'confidence_threshold': 1.0}),
  'a rejection without a threshold': ('exits.json', 'reject', {'risk': 0.1, 'delta': 0.1}),
  'a negative rejection': ('exits.json', 'reject', {'risk': 0.1, 'delta': 0.1, 'confidence_threshold': -1}),
  'a rejection that is a number': ('exits.json', 'reject', 0.1),
  'sets of another number of exits': ('exits.json', 'sets', SETS | {'limits': [0.5]}),
  'sets of full coverage': ('exits.json', 'sets', SETS | {'coverage': 1}),
  'sets without free classes': ('exits.json', 'sets', SETS | {'free': 0}),
  'sets of NaN': ('exits.json', 'sets', SETS | {'anytime': NAN}),
  'sets with a negative penalty': ('exits.json', 'sets', SETS | {'penalty': -1}),
  'no sets': ('exits.json', 'sets', []),
  'nothing seen': ('exits.json', 'seen', SEEN | {'images': 0, 'counts': [[0], [0, 0], [0]], 'classes': [0] * 5}),
  'other images seen': ('exits.json', 'seen', SEEN | {'images': 9}),
  'other classes seen': ('exits.json', 'seen', SEEN | {'classes': [10]}),
  'edges that fall': ('exits.json', 'seen', SEEN | {'edges': [[], [0.9, 0.5], []], 'counts': [[2], [3, 3, 0], [2]]}),
  'a probability of 2': ('exits.json', 'seen', SEEN | {'edges': [[], [2], []]}),
  'too few bins': ('exits.json', 'seen', SEEN | {'counts': [[2], [6], [2]]}),
  'more wrong than seen': ('exits.json', 'seen', SEEN | {'wrong': 11}),
  'more wrong than answered': ('exits.json', 'seen', SEEN | {'wrong': 5, 'answered': 4}),
  'more answered than seen': ('exits.json', 'seen', SEEN | {'answered': 11}),
  'counts of text': ('exits.json', 'seen', SEEN | {'counts': [['2'], [3, 3], [2]]}),
  'counts that are no lists': ('exits.json', 'seen', SEEN | {'counts': [2, 6, 2]}),
  'seen without its fields': ('exits.json', 'seen', {}),
  'no side': ('preprocessing.json', 'side', 0),
  'huge side': ('preprocessing.json', 'side', 10**9),
  'channels': ('preprocessing.json', 'channels', 4),
  'NaN mean': ('preprocessing.json', 'mean', [NAN] * 3),
  'mean of pixels': ('preprocessing.json', 'mean', [127.5] * 3),
  'zero deviation': ('preprocessing.json', 'std', [0.25, 0.0, 0.25]),
  'negative deviation': ('preprocessing.json', 'std', [-0.25] * 3),
  'NaN deviation': ('preprocessing.json', 'std', [NAN] * 3),
  'too few deviations': ('preprocessing.json', 'std', [0.25]),
  'scaled to less than the side': ('preprocessing.json', 'short_side', 1),
  'unknown interpolation': ('preprocessing.json', 'interpolation', 'nearest'),
}


@pytest.mark.parametrize('name', FIELDS)
def test_fields(folder, name):
  file, field, value = FIELDS[name]
  seal(folder, file, read(folder, file) | {field: value})
  rules = {field: words for part in run._RULES.values() for field, (_, words) in part.items()}
  assert refusal(folder) == f'{file}: {field} must be {rules[field]}, found {run._shown(value)}{AGAIN}'


def test_promises(folder, tmp_path, capsys):
  changes = {'reject': {'risk': 0.1, 'delta': 0.1, 'confidence_threshold': None}, 'sets': SETS}
  seal(folder, 'exits.json', read(folder, 'exits.json') | {'confidence_thresholds': [None, None, 0.0]} | changes)
  path = tmp_path / 'a.png'
  Image.fromarray(IMAGES[0]).save(path)
  names = [f'class {label}' for label in np.argsort(-run.load(folder).predict_one(IMAGES[0]).probabilities)[:5]]
  assert run.main([f'--bundle={folder}', str(path)]) == 0
  out, err = capsys.readouterr()
  assert out.splitlines()[0].endswith('  exit  set') and err.startswith('1 image, 1 unknown; ')
  assert out.splitlines()[1].split()[1] == 'unknown' and out.endswith(f'     3  {", ".join(names)}\n')
  for flag in ('--threshold=1', '--budget=25', '--deadline-ms=1000'):
    assert run.main([f'--bundle={folder}', flag, str(path)]) == 0
    out, err = capsys.readouterr()
    assert err.startswith('no share of errors among the answers is promised with --threshold, --budget or --deadline-')
    assert err.count('1 image, 1 unknown; ') == 1 and '  unknown  ' in out


@pytest.fixture
def watched(folder, tmp_path):
  """A bundle of which no image left at the first exit in calibration, and 300 times an image that does."""
  counts = {'images': 1000, 'edges': [[], [], []], 'counts': [[0], [500], [500]], 'classes': [200] * 5, 'wrong': 100}
  changes = {'seen': counts}
  seal(folder, 'exits.json', read(folder, 'exits.json') | changes)
  path = tmp_path / 'a.png'
  Image.fromarray(IMAGES[0]).save(path)
  return [f'--bundle={folder}', f'--watch={tmp_path / "state.json"}', *[str(path)] * 300]


def test_watching(watched, tmp_path, capsys):
  assert run.main(watched) == 0
  out, err = capsys.readouterr()
  alarm, summary = err.splitlines()
  assert alarm.startswith('drift: after ') and alarm.endswith('look at the images, and calibrate again')
  assert summary == '300 images; exit 1: 100.0 %; exit 2: 0.0 %; exit 3: 0.0 %' and len(out.splitlines()) == 301
  state = json.loads((tmp_path / 'state.json').read_text())
  assert state['alarm']['images'] == state['images'] <= 300
  # A new start says it at once. The next images all go to the last exit, if that is wanted.
  assert run.main([*watched[:3], '--on-drift=safe']) == 0
  assert capsys.readouterr().err.splitlines()[0] == f'{alarm}; no image exits early now'
  (tmp_path / 'state.json').unlink()
  assert run.main([*watched[:3], '--alpha=0.5']) == 0
  assert capsys.readouterr().err.startswith('1 image; ')
  assert json.loads((tmp_path / 'state.json').read_text())['images'] == 1


def test_no_image_exits_early_after_an_alarm(watched, capsys):
  assert run.main([*watched, '--on-drift=safe']) == 0
  alarm, summary = capsys.readouterr().err.splitlines()
  assert alarm.startswith('drift: after 256 images, ') and alarm.endswith('; no image exits early now')
  assert summary == '300 images; exit 1: 85.3 %; exit 2: 0.0 %; exit 3: 14.7 %'  # 256 of 300, in waves of 64.


@pytest.mark.parametrize('flag', ['--threshold=0.5', '--budget=1M', '--deadline-ms=5'])
def test_watching_other_exits(watched, flag, capsys):
  assert run.main([*watched, flag]) == 2
  assert capsys.readouterr().err == (
    'error: --watch compares with the exits of calibration; leave out --threshold, --budget and --deadline-ms, or it\n'
  )


@pytest.mark.parametrize('thresholds', [None, [0.6, 0.6, 0.0]])
def test_thresholds_on_the_scale_of_the_score(folder, thresholds):
  seal(folder, 'exits.json', read(folder, 'exits.json') | {'thresholds': thresholds})
  run.load(folder)


def test_a_field(folder):
  seal(folder, 'exits.json', read(folder, 'exits.json') | {'temperatures': [NAN, 1.0, 0.0]})
  assert refusal(folder) == (
    'exits.json: temperatures must be a number above 0 for each exit, found [NaN, 1.0, 0.0]; '
    'copy or export the bundle again'
  )


NO_FILE = 'the name of an .onnx file in the folder'
STAGE_FIELDS = {
  'parent': ('file', '../stage_1.onnx', NO_FILE),
  'absolute': ('file', '/etc/stage_1.onnx', NO_FILE),
  'of Windows': ('file', 'C:stage_1.onnx', NO_FILE),
  'another suffix': ('file', 'run.py', NO_FILE),
  'not of UTF-8': ('file', '\udcff.onnx', NO_FILE),
  'no list': ('takes', 'images', 'a list of objects with a name'),
  'no names': ('gives', [{'shape': []}], 'a list of objects with a name'),
  'no text': ('keeps', [1], 'a list of names'),
}


@pytest.mark.parametrize('name', STAGE_FIELDS)
def test_fields_of_stages(folder, name):
  field, value, words = STAGE_FIELDS[name]
  bundle = read(folder)
  bundle['stages']['stage_2'][field] = value
  (folder / 'bundle.json').write_text(json.dumps(bundle))
  message = f'bundle.json: stages.stage_2.{field} must be {words}, found {json.dumps(value)}{AGAIN}'
  assert refusal(folder) == message


def test_other_formats(folder):
  (folder / 'bundle.json').write_text(json.dumps(read(folder) | {'formats': ['stablehlo']}))
  assert refusal(folder) == 'expected ONNX stages in FOLDER, found stablehlo; export with --format=onnx'


def test_too_few_classes(folder):
  seal(folder, 'classes.json', ['a'])
  assert refusal(folder) == f'classes.json: class_names must be a list of 5 names, found ["a"]{AGAIN}'


def test_values_that_are_nested_too_deeply_to_show():
  value = []
  for _ in range(10**4):
    value = [value]
  assert run._shown(value) == 'deeply nested values' and run._shown([[]]) == '[[]]'


def test_long_values_are_shortened(folder):
  seal(folder, 'exits.json', read(folder, 'exits.json') | {'exits': [3] * 1000})
  assert refusal(folder).endswith(f', found [{"3, " * 18}3,...{AGAIN}')


@pytest.mark.parametrize('place', ['an initializer', 'a constant', 'a branch'])
def test_weights_in_another_file(folder, place):
  model = onnx.load(folder / 'stage_1.onnx')
  (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == 'exit')
  if place == 'an initializer':
    external = tensor
  else:
    node = onnx.helper.make_node('Constant', [], ['unused'], value=tensor)
    external = node.attribute[0].t
    if place == 'a branch':
      branch = onnx.helper.make_graph([node], 'branch', [], [])
      node = onnx.helper.make_node('If', ['x'], ['y'], then_branch=branch)
      external = node.attribute[0].g.node[0].attribute[0].t
    model.graph.node.append(node)
    external = model.graph.node[-1].attribute[0]
    external = external.g.node[0].attribute[0].t if place == 'a branch' else external.t
  onnx.external_data_helper.set_external_data(external, 'weights.bin')
  external.ClearField('raw_data')
  seal(folder, 'stage_1.onnx', model.SerializeToString())
  (folder / 'weights.bin').write_bytes(bytes(10**4))
  assert refusal(folder) == (
    'stage_1.onnx keeps weights in another file, which no checksum covers; export the run again'
  )


def test_scaling(folder):
  before = read(folder, 'preprocessing.json')
  seal(folder, 'preprocessing.json', before | {'short_side': 9, 'interpolation': 'bicubic'})
  assert run.load(folder).scaling == run.Scaling(9, 'bicubic')
  older = {name: value for name, value in before.items() if name not in run.TO_SIDE._fields}
  seal(folder, 'preprocessing.json', older)
  assert run.load(folder).scaling == run.TO_SIDE


def test_stages_that_do_not_fit_the_fields(folder):
  seal(folder, 'preprocessing.json', read(folder, 'preprocessing.json') | {'side': 9})
  with pytest.raises(run.BundleError, match=r'^onnxruntime cannot run .*stage_1.onnx \(.*; export the run again, or '):
    run.load(folder).predict(np.zeros((1, 9, 9, 3), np.uint8))
  seal(folder, 'preprocessing.json', read(folder, 'preprocessing.json') | {'side': 8})
  seal(folder, 'classes.json', ['a'])
  bundle = read(folder) | {'num_classes': 1}
  (folder / 'bundle.json').write_text(json.dumps(bundle))
  with pytest.raises(run.BundleError, match=r'^expected 1 finite logits per image from .*stage_1.onnx, found others; '):
    run.load(folder).predict_one(IMAGES[0])


def test_weights_that_are_nan(folder):
  model = onnx.load(folder / 'stage_1.onnx')
  for tensor in model.graph.initializer:
    if tensor.name == 'exit':
      tensor.raw_data = np.full(len(tensor.raw_data) // 4, np.nan, np.float32).tobytes()
  seal(folder, 'stage_1.onnx', model.SerializeToString())
  with pytest.raises(run.BundleError, match='expected 5 finite logits per image'):
    run.load(folder).predict(IMAGES)


def overflow(monkeypatch, change):
  """Stages give the logits change(logits, inputs) in place of their own."""
  session = run._onnxruntime

  def changed(*given):
    opened = session(*given)

    def compute(names, values):
      logits, *others = opened(names, values)
      return change(logits.copy(), values), *others

    return compute

  monkeypatch.setattr(run, '_onnxruntime', changed)


@pytest.mark.filterwarnings('ignore:invalid value')
def test_images_whose_logits_overflow_are_answered_apart(folder, monkeypatch):
  def second(logits, _):
    logits[1:2] = np.inf
    return logits

  expected = run.load(folder).with_threshold(0).predict(IMAGES)
  overflow(monkeypatch, second)
  found = run.load(folder).with_threshold(0).predict(IMAGES)
  assert np.flatnonzero(~found.finite).tolist() == [1]
  np.testing.assert_array_equal(found.probabilities[[0, 2, 3]], expected.probabilities[[0, 2, 3]])


@pytest.mark.filterwarnings('ignore:invalid value')
def test_a_single_image_whose_logits_overflow(folder, monkeypatch):
  def all_but_gray(logits, inputs):
    return np.full_like(logits, np.inf) if any(each.any() for each in inputs.values()) else logits

  overflow(monkeypatch, all_but_gray)
  bundle = run.load(folder)
  for found in (bundle.predict(IMAGES[:1]), bundle.predict_one(IMAGES[0]), *bundle.anytime(IMAGES[0])):
    assert np.isnan(found.probabilities).all()


def test_links_to_files_and_other_files_do_not_matter(folder, whole, tmp_path):
  moved = folder / 'stage_1.onnx'
  moved.rename(tmp_path / 'blob')
  moved.symlink_to(tmp_path / 'blob')
  (folder / 'README.md').write_text('mine')
  np.testing.assert_array_equal(run.load(folder).predict(IMAGES).labels, run.load(whole).predict(IMAGES).labels)


def test_class_names_are_escaped_on_terminals(folder, tmp_path, capsys):
  seal(folder, 'classes.json', ['\x1b[2J\u202e\udcff'] * 5)
  from PIL import Image

  Image.fromarray(IMAGES[0]).save(tmp_path / 'a.png')
  assert run.main([f'--bundle={folder}', str(tmp_path / 'a.png')]) == 0
  assert r' \x1b[2J\u202e\udcff ' in capsys.readouterr().out
