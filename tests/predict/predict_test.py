"""Tests of `python -m paranet_jax.predict`, with a stand-in for the network."""

import csv
import io
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import contents
from unwritable import run_with_closed_pipe, run_with_full_disk

from paranet_jax.host.errors import UserError
from paranet_jax.portable.run import Predictions, Scaling
from paranet_jax.predict.__main__ import main
from paranet_jax.predict.output import make_format, open_output, prediction_rows, table_format
from paranet_jax.predict.tally import LiveLine, Tally

MACS = {1: 1_000, 3: 40_000}


class Fake:
  """Gray g is class g // 64 with probability 0.7, the next has 0.2; even classes exit at 1, odd ones at 3."""

  class_names = ('ant', 'bee', 'cow', 'dog')
  image_shape = (8, 8, 3)
  scaling = Scaling(16)
  rejects, coverage = False, None
  plan = types.SimpleNamespace(exits=(1, 3), macs_alone=(1_000, 30_000), policy='optimal')

  def __init__(self, workdir, step):
    self.asked, self.batches = (workdir, step), []

  def predict(self, images):
    self.batches.append(len(images))
    labels = images[:, 0, 0, 0] // 64
    probabilities = np.full((len(images), 4), 0.05, np.float32)
    probabilities[np.arange(len(images)), labels] = 0.7
    probabilities[np.arange(len(images)), (labels + 1) % 4] = 0.2
    exits = np.where(labels % 2, 3, 1)
    macs = np.array([MACS[number] for number in exits.tolist()], np.int64)
    return Predictions(labels, probabilities, exits, macs)


@pytest.fixture(autouse=True)
def fake(tmp_path, monkeypatch):
  """Replaces the real runtime, which takes seconds to import and to compile; holds what was loaded."""
  loaded = []

  def load(workdir, step=None):
    loaded.append(Fake(workdir, step))
    return loaded[-1]

  module = types.SimpleNamespace(EarlyExit=types.SimpleNamespace(load=load))
  monkeypatch.setitem(sys.modules, 'paranet_jax.early.runtime', module)
  monkeypatch.chdir(tmp_path)
  for name, grey in (('a.png', 10), ('b.png', 70), ('c.png', 130)):
    Image.new('L', (20, 10), grey).save(name)
  Path('text.png').write_text('not an image')
  return loaded


@pytest.fixture
def predict(capsys):
  def run(*arguments):
    code = main(['--workdir=run', *map(str, arguments)])
    return code, *capsys.readouterr()

  return run


def row(file, label, exit, *runners_up):
  top = [{'label': label, 'probability': 0.7}, *({'label': r, 'probability': p} for r, p in runners_up)]
  return {'file': file, 'label': label, 'probability': 0.7, 'exit': exit, 'macs': MACS[exit], 'top': top}


SUMMARY = (
  '3 images; exit 1: 66.7 %; exit 3: 33.3 %; 14.0 k multiply-adds per image, 2.14 x fewer than exit 3 alone (30.0 k)\n'
)


def test_json(predict, fake, tmp_path):
  code, out, err = predict('c.png', '--format=json', 'a.png', 'b.png', '--top=2', '--step=7')
  assert json.loads(out) == [
    row('c.png', 'cow', 1, ('dog', 0.2)),
    row('a.png', 'ant', 1, ('bee', 0.2)),
    row('b.png', 'bee', 3, ('cow', 0.2)),
  ]
  assert out.count('\n') == 5  # One object per line.
  assert (code, err) == (0, SUMMARY)  # (1,000 + 1,000 + 40,000) / 3 = 14,000.
  assert fake[0].asked == (tmp_path / 'run', 7)


def test_a_run_that_is_not_calibrated_says_so(predict, monkeypatch, tmp_path):
  monkeypatch.setattr(Fake, 'plan', types.SimpleNamespace(exits=(1, 3), macs_alone=(1_000, 30_000), policy='full'))
  code, out, err = predict('a.png', '--format=json')
  assert code == 0 and len(json.loads(out)) == 1
  assert err.splitlines()[0] == (
    'not calibrated: all images go to exit 3; python -m paranet_jax.calibrate '
    f'--workdir={tmp_path}/run --threshold=0.9 lets them exit earlier'
  )
  monkeypatch.setattr(Fake, 'plan', types.SimpleNamespace(exits=(3,), macs_alone=(30_000,), policy='full'))
  monkeypatch.setattr('paranet_jax.predict.__main__._predict', lambda *_: None)
  assert predict('a.png')[2].splitlines()[0] == 'not calibrated: all images go to exit 3'


def test_csv(predict):
  code, out, _ = predict('--format=csv', 'a.png', '--top=3')
  assert (code, out) == (
    0,
    'file,label,probability,exit,macs,label_2,probability_2,label_3,probability_3\n'
    'a.png,ant,0.7,1,1000,bee,0.2,cow,0.05\n',
  )


@pytest.fixture
def promising(monkeypatch):
  """Images of odd classes are unknown, and sets hold what is at least as probable as 0.2."""

  def rejecting(self, images, predict=Fake.predict):
    found = predict(self, images)
    return found._replace(labels=np.where(found.labels % 2, 4, found.labels))

  monkeypatch.setattr(Fake, 'predict', rejecting)
  monkeypatch.setattr(Fake, 'rejects', True)
  monkeypatch.setattr(Fake, 'coverage', 0.9)
  monkeypatch.setattr(Fake, 'sets', lambda self, answers: answers.probabilities > 0.1, raising=False)


@pytest.mark.usefixtures('promising')
def test_unknown_images_and_sets(predict):
  code, out, err = predict('--format=json', 'a.png', 'b.png', '--top=2')
  assert json.loads(out) == [
    row('a.png', 'ant', 1, ('bee', 0.2)) | {'unknown': False, 'set': ['ant', 'bee']},
    row('b.png', 'bee', 3, ('cow', 0.2)) | {'label': None, 'unknown': True, 'set': ['bee', 'cow']},
  ]
  assert code == 0 and err.startswith('2 images, 1 unknown; exit 1: 50.0 %; ')
  assert predict('--format=csv', 'b.png', '--top=1')[1] == (
    'file,label,probability,exit,macs,unknown,set\nb.png,,0.7,3,40000,true,"[""bee"", ""cow""]"\n'
  )
  assert predict('a.png', 'b.png')[1] == (
    'file   label    probability  exit      macs  set\n'
    'a.png  ant            0.700     1     1,000  ant, bee\n'
    'b.png  unknown        0.700     3    40.0 k  bee, cow\n'
  )


@pytest.mark.parametrize(
  ('columns', 'shown'),
  [
    (None, 'ant, bee, brown cow'),
    (61, 'ant, bee, brown cow'),
    (60, 'ant and 2 more'),
    (56, 'ant and 2 more'),
    (55, '3 classes'),
  ],
)
def test_a_set_on_a_terminal_keeps_to_its_width(columns, shown):
  names = ['ant', 'bee', 'brown cow']
  found = table_format(['a'], ['ant'], columns, ['set']).row(row('a', 'ant', 1) | {'set': names})
  assert found == f'a     ant          0.700     1     1,000  {shown}\n'


@pytest.mark.parametrize('format', ['json', 'csv', 'table'])
@pytest.mark.usefixtures('promising')
def test_answers_that_are_not_finite_are_reported(predict, monkeypatch, format):
  def diverging(self, images, predict=Fake.predict):
    found = predict(self, images)
    found.probabilities[1] = np.nan
    return found

  monkeypatch.setattr(Fake, 'predict', diverging)
  code, out, err = predict('a.png', 'b.png', 'c.png', f'--format={format}')
  assert code == 1 and 'b.png' not in out and 'a.png' in out and 'c.png' in out and 'nan' not in out.lower()
  assert err.startswith("error: b.png: the network's answer is not finite\n2 images, 1 unreadable; exit 1: 100.0 %; ")
  if format == 'json':
    assert [(row['file'], row['label']) for row in json.loads(out)] == [('a.png', 'ant'), ('c.png', 'cow')]


def test_no_more_classes_than_there_are(predict):
  assert predict('--format=csv', 'a.png', '--top=9')[1].startswith(
    'file,label,probability,exit,macs,label_2,probability_2,label_3,probability_3,label_4,probability_4\n'
  )


def test_table(predict):
  code, out, err = predict('.')
  assert out == (
    'file        label  probability  exit      macs  next best\n'
    './a.png     ant          0.700     1     1,000  bee 0.200, cow 0.050, dog 0.050\n'
    './b.png     bee          0.700     3    40.0 k  cow 0.200, ant 0.050, dog 0.050\n'
    './c.png     cow          0.700     1     1,000  dog 0.200, ant 0.050, bee 0.050\n'
  )
  assert (code, err) == (
    1,
    'error: ./text.png: not an image in a known format (PNG, JPEG, GIF, BMP, PPM, WEBP, TIFF)\n'
    + SUMMARY.replace(';', ', 1 unreadable;', 1),
  )


def test_a_table_on_a_terminal_keeps_to_its_width():
  long = 'x' * 70
  table = table_format(['a', 'b\n', long], ['y' * 30, 'z'], columns=60)
  best = [
    {'label': 'z', 'probability': 0.5},
    {'label': 'z', 'probability': 0.25},
    {'label': 'y' * 30, 'probability': 0.1},
  ]
  values = {'label': 'z', 'probability': 0.5, 'exit': 2, 'macs': 5, 'top': best}
  # 60 characters for the file and 24 for the label leave no room; the long name only shifts its own row.
  assert table.row({'file': 'a', **values}) == f'{"a":60}  {"z":24}  {"0.500":>11}  {2:>4}  {5:>8}\n'
  assert table.row({'file': long, **values}).startswith(f'{long}  z  ')
  narrow = table_format(['a', 'b\n'], ['z'], columns=60)
  assert narrow.row({'file': 'b\n', **values}) == 'b\\n   z            0.500     2         5  z 0.250\n'


def test_the_predicted_label_comes_first_among_equal_probabilities():
  equal = Predictions(np.array([2]), np.float32([[0.5, 0, 0.5]]), np.array([1]), np.array([1]))
  (found,) = prediction_rows(['a'], equal, ('x', 'y', 'z'), 2)
  assert [entry['label'] for entry in found['top']] == ['z', 'x'] and found['label'] == 'z'


@pytest.mark.parametrize('format', ['json', 'csv', 'table'])
def test_nothing_readable(predict, format):
  code, out, err = predict('gone.png', 'text.png', f'--format={format}')
  assert code == 1
  assert err == (
    'error: gone.png: No such file or directory\n'
    'error: text.png: not an image in a known format (PNG, JPEG, GIF, BMP, PPM, WEBP, TIFF)\n'
    '0 images, 2 unreadable\n'
  )
  assert json.loads(out) == [] if format == 'json' else out.count('\n') == 1


def test_batches_stream_in_order(predict, fake, tmp_path):
  (tmp_path / 'many').mkdir()
  for i in range(10):
    (tmp_path / 'many' / f'{i}.png').write_bytes(Path(f'{"abc"[i % 3]}.png').read_bytes())
  code, out, err = predict('many', '--format=csv', '--batch-size=4')
  assert [line[5:11] for line in out.splitlines()[1:]] == [f'{i}.png,' for i in range(10)]
  assert fake[0].batches == [4, 4, 2] and ' images/s\n' in err


def test_odd_names(predict):
  image = Path('a.png').read_bytes()
  latin = os.fsdecode(b'caf\xe9.png')
  names = ['line\nbreak.png', latin, './-x, "y"é.png']
  for name in names:
    Path(name).write_bytes(image)
  assert [entry['file'] for entry in json.loads(predict(*names, '--format=json')[1])] == names
  expected = [names[0], 'caf\\udce9.png', names[2]]
  text = predict(*names, '--format=csv')[1]
  assert [line[0] for line in csv.reader(io.StringIO(text))][1:] == expected
  assert predict(*names, '--format=csv', '--output=o')[:2] == (0, '')
  assert Path('o').read_text('utf-8') == text
  assert [line.split('  ')[0] for line in predict(*names)[1].splitlines()[1:]] == ['line\\nbreak.png', *expected[1:]]
  assert predict('--', names[2][2:])[0] == 0
  Path(latin).write_text('text')
  assert predict(latin)[2].startswith('error: caf\\udce9.png: not an image')


def test_odd_class_names():
  names = ['caf\udce9', '\x1b[2J\n']
  row = {'file': 'a', 'label': names[0], 'probability': 0.6, 'exit': 1, 'macs': 1}
  row['top'] = [{'label': name, 'probability': 0.5} for name in names]
  table = table_format(['a'], names, None)
  assert table.before.startswith('file  label      prob')
  assert table.row(row) == r'a     caf\udce9        0.600     1         1  \x1b[2J\n 0.500' + '\n'

  class Terminal(io.StringIO):
    def isatty(self):
      return True

  assert list(csv.reader([make_format('csv', ['a'], names, 2, Terminal()).row(row)]))[0][5] == r'\x1b[2J\n'
  assert list(csv.reader(io.StringIO(make_format('csv', ['a'], names, 2, io.StringIO()).row(row))))[0][5] == names[1]


def test_pillow_warnings_do_not_leak(predict, monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 150)  # 200 pixels make Pillow warn; pytest makes that an error.
  with pytest.raises(Image.DecompressionBombWarning), open('a.png', 'rb') as file:
    Image.open(file)
  assert predict('a.png')[0] == 0


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['a.png', '--top=0'], 'argument --top: expected an integer of 1 or more, found 0; see --help'),
    (
      ['a.png', f'--batch-size={10**8}'],
      'argument --batch-size: expected an integer from 1 to 16,384, found 100000000; see --help',
    ),
    (
      ['a.png', '--max-memory=0'],
      'argument --max-memory: expected a number above 0 such as 5M, found 0; see --help',
    ),
    (['a.png', '--batch-size=-1'], 'argument --batch-size: expected an integer of 1 or more, found -1; see --help'),
    (
      ['a.png', '--output=~nobody-here/x'],
      'expected a path, found ~nobody-here/x, whose home folder is unknown; write it in full, or set HOME',
    ),
    (['a.png', '--tops=1'], 'unrecognized arguments: --tops=1; see --help'),
    ([], 'expected image files or folders of images, found none; name them after the flags'),
    (['a.png', '--output=b.png'], '{here}/b.png already exists; set --output to another file, or --overwrite'),
    (['a.png', '--output=.', '--overwrite'], '--output must be a file, and {here} is not one; set --output'),
    (
      ['a.png', '--output=no/x'],
      '--output must be in an existing folder, and {here}/no is none; make it, or set --output',
    ),
  ],
)
def test_rejected(predict, fake, arguments, message):
  assert predict(*arguments) == (2, '', f'error: {message.format(here=os.getcwd())}\n')
  assert not fake  # Before anything is loaded.


def test_an_output_that_could_not_be_written_is_refused_first(predict, fake, tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'access', lambda path, mode: path != tmp_path)  # Root may write everywhere.
  message = f'error: --output must be in a writable folder, and {tmp_path} is not; set --output\n'
  assert predict('a.png', '--output=o') == (2, '', message)
  assert not fake


@pytest.mark.parametrize(
  ('make', 'output', 'replaced'),
  [
    (lambda: None, 'a.png', 'a.png'),
    (lambda: os.symlink('a.png', 'link.png'), 'link.png', 'a.png'),
    (lambda: os.symlink('.', 'folder'), 'folder/b.png', 'b.png'),
    (lambda: os.link('b.png', 'same.png'), 'same.png', 'b.png'),
  ],
)
def test_an_image_that_is_read_is_not_replaced(predict, fake, tmp_path, make, output, replaced):
  make()
  before = contents(tmp_path)
  for given in ('a.png', 'b.png'), ('.',):
    code, out, err = predict(*given, f'--output={output}', '--overwrite')
    assert (code, out) == (2, '')
    assert err.startswith(f'error: {tmp_path}/{output} would replace the image ')
    assert err.endswith(', which is read; set --output to another file\n') and err.count('\n') == 1
  assert contents(tmp_path) == before and not fake


@pytest.mark.parametrize('output', ['config.json', 'summary.json', 'lock', 'checkpoints/1/state', 'link/exits.json'])
def test_a_file_of_a_run_is_not_replaced(predict, fake, tmp_path, output):
  (tmp_path / 'run/checkpoints/1').mkdir(parents=True)
  (tmp_path / 'run/link').symlink_to('.')
  (tmp_path / 'run/config.json').write_text('{}')
  before = contents(tmp_path)
  code, _, err = predict('a.png', f'--output=run/{output}', '--overwrite')
  where = f'{tmp_path}/run/{output} would be a file of the run in {tmp_path}/run'
  expected = f'error: {where}; set --output to another file\n'
  assert (code, err) == (2, expected)
  assert contents(tmp_path) == before and not fake
  assert predict('a.png', '--output=run/answers.csv')[0] == 0


def test_a_user_error_of_the_runtime_is_one_line(predict, monkeypatch):
  def refuse(workdir, step):
    raise UserError('expected exits.json,\n  found \x1b')

  monkeypatch.setattr(sys.modules['paranet_jax.early.runtime'].EarlyExit, 'load', refuse)
  assert predict('a.png', '--output=o') == (2, '', 'error: expected exits.json, found \\x1b\n')
  assert not Path('o').exists()


def test_no_workdir(capsys):
  assert main(['a.png']) == 2
  assert capsys.readouterr().err == 'error: the following arguments are required: --workdir; see --help\n'


def test_an_unknown_format(predict):
  code, _, err = predict('a.png', '--format=xml')
  assert code == 2 and err.startswith("error: argument --format: invalid choice: 'xml' (choose from ")


def test_help(capsys):
  with pytest.raises(SystemExit) as caught:
    main(['--help'])
  assert caught.value.code == 0 and 'FILE_OR_FOLDER' in capsys.readouterr().out


def test_an_output_file(predict):
  code, out, err = predict('a.png', 'text.png', '--format=json', '--output=o')
  assert (code, out) == (1, '') and json.loads(Path('o').read_text())[0]['label'] == 'ant'
  assert predict('b.png', '--format=csv', '--output=o')[0] == 2
  assert json.loads(Path('o').read_text())[0]['label'] == 'ant'
  assert predict('b.png', '--format=csv', '--output=o', '--overwrite')[0] == 0
  assert Path('o').read_text().startswith('file,label')
  assert sorted(os.listdir()) == ['a.png', 'b.png', 'c.png', 'o', 'text.png']  # No temporary file.


def interrupt_after(monkeypatch, count, error=KeyboardInterrupt):
  whole = Fake.predict

  def predict(self, images):
    if len(self.batches) == count:
      raise error
    return whole(self, images)

  monkeypatch.setattr(Fake, 'predict', predict)


def test_interrupted(predict, monkeypatch):
  interrupt_after(monkeypatch, 1)
  code, out, err = predict('a.png', 'b.png', 'c.png', '--batch-size=1', '--format=json')
  assert code == 130 and [entry['file'] for entry in json.loads(out)] == ['a.png']
  assert err.startswith('stopped after 1 of 3 files\n1 image; ')


@pytest.mark.parametrize('error', [KeyboardInterrupt, ZeroDivisionError])
def test_an_incomplete_output_file_does_not_appear(predict, monkeypatch, error):
  interrupt_after(monkeypatch, 1, error)
  before = sorted(os.listdir())
  arguments = ('a.png', 'b.png', '--batch-size=1', '--output=o')
  if error is KeyboardInterrupt:
    code, out, err = predict(*arguments)
    assert (code, out) == (130, '') and err.startswith(
      f'stopped after 1 of 2 files, and {os.getcwd()}/o was not written\n'
    )
  else:
    with pytest.raises(error):
      predict(*arguments)
  assert sorted(os.listdir()) == before


def test_interrupted_while_loading(predict, monkeypatch):
  def interrupt(workdir, step):
    raise KeyboardInterrupt

  monkeypatch.setattr(sys.modules['paranet_jax.early.runtime'].EarlyExit, 'load', interrupt)
  assert predict('a.png') == (130, '', 'stopped at once\n')


def test_a_full_disk():
  with pytest.raises(UserError) as caught, open_output(Path('o')):
    raise OSError(28, 'No space left on device')
  assert str(caught.value) == 'o cannot be written: No space left on device; set --output to another file'
  assert not Path('o').exists()


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_no_live_line_where_the_rows_are(monkeypatch, capsys):
  err = Terminal()
  monkeypatch.setenv('COLUMNS', '80')
  monkeypatch.setattr(sys, 'stderr', err)
  assert main(['--workdir=run', 'a.png', 'text.png', '--batch-size=1']) == 1
  shown = err.getvalue().replace('\r', '<').replace('\x1b[K', '>')
  assert shown.startswith('<0/2 images><1/2 images><>error: text.png: not an image in a known format (')
  assert ', TIFF)\n<2/2 images' in shown
  assert '<>1 image, 1 unreadable; ' in shown
  monkeypatch.setattr(sys, 'stdout', Terminal())
  err.truncate(0)
  main(['--workdir=run', 'a.png'])
  assert '\r' not in err.getvalue()


def test_the_live_line_shows_speed_and_time_left_and_fits(monkeypatch):
  stream = io.StringIO()
  monkeypatch.setenv('COLUMNS', '60')
  LiveLine(stream, 10_000, live=True).update(1_000, 50.0)
  assert stream.getvalue() == '\r1,000/10,000 images  50.0 images/s  3 min 00 s left\x1b[K'
  monkeypatch.setenv('COLUMNS', '20')
  LiveLine(stream, 10_000, live=True).update(1_000, 50.0)
  assert stream.getvalue().endswith('\r1,000/10,000 images\x1b[K')


def test_a_live_line_that_cannot_be_written_is_left_out():
  with open('/dev/full', 'w') as stream:
    line = LiveLine(stream, 10, live=True)
    line.update(1, 5.0)
    assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))  # For all that is written later.
    line.message('done')


def test_the_speed_leaves_out_the_first_batch():
  times = iter([90.0, 100.0, 102.0, 104.0])
  tally = Tally(Fake.plan, clock=lambda: next(times))
  exits, macs = np.array([1, 3]), np.array([1_000, 40_000])
  tally.add(exits[:0], macs[:0], 1)
  tally.add(exits, macs, 0)
  assert tally.images_per_second == 0
  tally.add(exits, macs, 0)
  assert tally.images_per_second == 1
  tally.add(exits, macs, 0)
  assert tally.images_per_second == 1 and tally.summary().startswith('6 images, 1 unreadable; ')


def test_standard_output_that_cannot_be_written():
  program = (
    f'import sys; sys.path[:0] = {[str(Path(__file__).parents[depth]) for depth in (2, 0)]!r}\n'
    f'sys.path += [{str(Path(__file__).parents[1] / "helpers")!r}]\n'
    'import types, predict_test\n'
    'load = types.SimpleNamespace(load=predict_test.Fake)\n'
    "sys.modules['paranet_jax.early.runtime'] = types.SimpleNamespace(EarlyExit=load)\n"
    "sys.exit(predict_test.main(['--workdir=run', '.']))\n"
  )
  command = [sys.executable, '-c', program]
  assert run_with_closed_pipe(command) == (141, '')
  assert run_with_full_disk(command) == (
    2,
    'error: standard output cannot be written: No space left on device; set --output to another file\n',
  )


@pytest.mark.parametrize('overwrite', [False, True])
def test_a_file_that_appears_meanwhile_is_replaced_only_on_request(predict, tmp_path, monkeypatch, overwrite):
  def predict_as_another_writes(self, images, then=Fake.predict):
    (tmp_path / 'o').write_text('of another')
    return then(self, images)

  monkeypatch.setattr(Fake, 'predict', predict_as_another_writes)
  code, out, err = predict('a.png', '--output=o', *['--overwrite'] * overwrite)
  if overwrite:
    assert code == 0 and (tmp_path / 'o').read_text().startswith('file')
  else:
    message = f'error: {tmp_path}/o already exists; set --output to another file, or --overwrite'
    assert (code, out, err.splitlines()[-1]) == (2, '', message)
    assert (tmp_path / 'o').read_text() == 'of another'
  assert not list(tmp_path.glob('o.*'))
