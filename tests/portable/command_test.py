"""`python run.py`: what it prints, its exit codes and its refusals, on a bundle made by hand."""

import os
import signal
import sys

import numpy as np
import pytest
import tiny_bundle
from PIL import Image

from paranet_jax.portable import run

PIXELS = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
  """All images go to exit 3."""
  return tiny_bundle.write(tmp_path_factory.mktemp('command') / 'bundle', probability=1)


@pytest.fixture
def photos(tmp_path):
  folder = tmp_path / 'photos'
  folder.mkdir()
  Image.fromarray(PIXELS).save(folder / 'a.png')
  return folder


@pytest.fixture
def command(bundle, capsys):
  """The exit code, the words of each line of standard output, and the lines of standard error."""

  def called(*arguments):
    code = run.main([f'--bundle={bundle}', *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, [line.split() for line in out.splitlines()], err.splitlines()

  return called


HEADER = ['file', 'label', 'probability', 'exit']
SHARES = 'exit 1: 0.0 %; exit 2: 0.0 %; exit 3: 100.0 %'


def test_what_cannot_be_read_is_named_and_the_rest_is_answered(command, bundle, photos, tmp_path):
  (photos / 'broken.png').write_bytes(b'no image')
  for name in ('notes.txt', '.hidden.png', 'b.md', 'c.md'):
    (photos / name).write_bytes(b'')
  code, rows, err = command(photos, tmp_path / 'gone.png')
  answer = run.load(bundle).predict_one(PIXELS)
  assert (code, rows) == (
    1,
    [HEADER, [f'{photos}/a.png', 'class', str(answer.label), f'{answer.probabilities.max():.3f}', '3']],
  )
  assert err == [
    f'left out 4 files, hidden or without the suffix of an image: {photos}/.hidden.png, {photos}/b.md, {photos}/c.md '
    'and 1 more',
    f'error: {photos}/broken.png: not an image in a known format ({", ".join(run.FORMATS)})',
    f'error: {tmp_path}/gone.png: No such file or directory',
    f'1 image, 2 unreadable; {SHARES}',
  ]


@pytest.mark.parametrize(
  ('flags', 'why'),
  [
    ((), None),
    (('--deadline-ms=1000',), None),
    (('--max-pixels=64',), None),
    (('--max-pixels=63',), 'expected at most 63 pixels, found 8 x 8; set --max-pixels'),
    (
      ('--max-memory=1',),
      'expected an image that takes at most 0 MiB to decode, found 8 x 8 that takes 0 MiB; set --max-memory',
    ),
  ],
)
def test_limits_of_an_image(command, photos, flags, why):
  code, rows, err = command(*flags, photos)
  if why is None:
    assert (code, len(rows), err) == (0, 2, [f'1 image; {SHARES}'])
  else:
    assert (code, rows) == (1, [HEADER])
    assert err == [f'error: {photos}/a.png: {why}', '0 images, 1 unreadable']


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--max-pixels=0', 'argument --max-pixels: expected a number above 0 such as 5M, found 0; see --help'),
    ('--max-pixels=nan', 'argument --max-pixels: expected a number above 0 such as 5M, found nan; see --help'),
    ('--max-memory=1e30', 'argument --max-memory: expected a number above 0 such as 5M, found 1e30; see --help'),
    ('--max-memory=much', 'argument --max-memory: expected a number such as 5M, found much; see --help'),
    ('--deadline-ms=soon', 'argument --deadline-ms: expected more than 0 ms, found soon; see --help'),
    ('--on-drift=safe', '--alpha and --on-drift belong to --watch, found none; set --watch, or leave them out'),
    ('--alpha=7', '--alpha and --on-drift belong to --watch, found none; set --watch, or leave them out'),
    ('--deadline-ms=nan', 'argument --deadline-ms: expected more than 0 ms, found nan; see --help'),
    ('--budget=nan', 'expected a budget of 10 multiply-adds or more, found nan; set --budget=10'),
  ],
)
def test_refused_values(command, photos, flag, message):
  assert command(flag, photos) == (2, [], [f'error: {message}'])


def test_an_answer_that_is_not_finite_is_reported(command, photos, monkeypatch):
  Image.fromarray(255 - PIXELS).save(photos / 'b.png')

  def diverging(self, images, predict=run.Adaptive.predict):
    found = predict(self, images)
    found.probabilities[0] = np.nan
    return found

  monkeypatch.setattr(run.Adaptive, 'predict', diverging)
  code, rows, err = command(photos)
  assert code == 1 and [row[0] for row in rows] == ['file', f'{photos}/b.png']
  assert err == [f"error: {photos}/a.png: the network's answer is not finite", f'1 image, 1 unreadable; {SHARES}']


def test_a_reason_that_quotes_the_file_is_printable(command, photos, monkeypatch):
  def refuse(*_):
    raise ValueError('Token too long in file header: \x1b]0;title\x07')  # As Pillow 11 does.

  monkeypatch.setattr(run, 'decode_image', refuse)
  code, _, err = command(photos)
  assert (code, err[0]) == (1, f'error: {photos}/a.png: Token too long in file header: \\x1b]0;title\\x07')


def test_a_folder_without_images(command, tmp_path):
  assert command(tmp_path) == (
    2,
    [],
    [f'error: expected images ({" ".join(run.SUFFIXES)}) in {tmp_path}, found none; name another folder, or files'],
  )


def test_control_c(command, photos, monkeypatch):
  monkeypatch.setattr(run, 'load', lambda *_: signal.raise_signal(signal.SIGINT))
  assert command(photos) == (130, [], ['stopped at once'])


def test_a_reader_that_has_stopped(command, photos, monkeypatch):
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, 'w') as stream:
    monkeypatch.setattr(sys, 'stdout', stream)
    assert command(photos) == (141, [], [])


def test_an_output_that_takes_nothing(command, photos, monkeypatch):
  message = 'standard output cannot be written (No space left on device); make room, or send it elsewhere'
  with open('/dev/full', 'w') as stream:
    monkeypatch.setattr(sys, 'stdout', stream)
    assert command(photos) == (2, [], [f'error: {message}'])
