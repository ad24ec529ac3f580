import errno
import fcntl
import json
import math
import os
import threading
from pathlib import Path

import pytest
from running import contents

from paranet_jax.base_config import base_config
from paranet_jax.display.metrics import read_metrics
from paranet_jax.early.exit_plan import read_plan
from paranet_jax.experiments.protocols import Protocol
from paranet_jax.experiments.results import load_results
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import damaged_file, file_checksums, json_line, read_object, replacing, sweep, write_json
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.dataset_facts import restore_dataset_facts
from paranet_jax.runs.status import run_status
from paranet_jax.runs.workdir import restore_config


def test_lists_of_numbers_are_on_one_line(tmp_path):
  value = {'a': [1, None, -2.5e-9], 'b': [[1, 2], [3]], 'names': ['[\n1,', 'x'], 'rows': [{'c': [True]}], 'd': []}
  write_json(tmp_path / 'a.json', value)
  text = (tmp_path / 'a.json').read_text()
  assert json.loads(text) == value and text.endswith('}\n')
  assert '"a": [1, null, -2.5e-09],\n' in text and '"b": [\n    [1, 2],\n    [3]\n  ],' in text


def test_a_line_of_json_has_no_number_that_json_lacks():
  value = {'a': math.nan, 'b': [1.5, math.inf], 'c': ({'d': -math.inf}, 'NaN', None, True, 2)}
  line = json_line(value)
  assert json.loads(line, parse_constant=pytest.fail) == {
    'a': None, 'b': [1.5, None], 'c': [{'d': None}, 'NaN', None, True, 2]
  }  # fmt: skip
  assert '\n' not in line


@pytest.mark.parametrize('failure', ['value', 'disk', 'interrupt'])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, failure):
  path = tmp_path / 'summary.json'
  write_json(path, {'steps': 1})

  def full(descriptor):
    raise OSError('no space left')

  if failure == 'disk':
    monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises((TypeError, OSError, KeyboardInterrupt)), replacing(path) as file:
    file.write('{')
    if failure == 'interrupt':
      raise KeyboardInterrupt
    if failure == 'value':
      file.write(b'bytes')
  assert read_object(path, '') == {'steps': 1}
  assert list(tmp_path.iterdir()) == [path]


def test_the_last_of_two_writers_wins(tmp_path):
  path = tmp_path / 'entry'
  with replacing(path, 'wb') as first:
    with replacing(path, 'wb') as second:
      second.write(b'second')
    first.write(b'first')
  assert path.read_bytes() == b'first'
  assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_swept_before_it_is_locked(tmp_path, monkeypatch):
  """Another process's `sweep` has found the temporary file and locked it, and then removes it."""
  opened, sweepers = Path.open, []

  def found_at_once(path, *arguments, **options):
    file = opened(path, *arguments, **options)
    if not sweepers:
      other = opened(path, 'rb')
      fcntl.flock(other, fcntl.LOCK_EX)
      sweepers.append(threading.Timer(0.05, lambda: (path.unlink(), other.close())))
      sweepers[0].start()
    return file

  monkeypatch.setattr(Path, 'open', found_at_once)
  with replacing(tmp_path / 'entry', 'wb') as file:
    file.write(b'whole')
  assert (tmp_path / 'entry').read_bytes() == b'whole' and list(tmp_path.iterdir()) == [tmp_path / 'entry']


def test_a_file_that_takes_its_place_is_not_swept(tmp_path, monkeypatch):
  """Another writer begins when all is written and the file has not been renamed yet."""
  replace = os.replace
  monkeypatch.setattr(os, 'replace', lambda *names: (sweep(tmp_path), replace(*names)))
  with replacing(tmp_path / 'entry', 'wb') as file:
    file.write(b'whole')
  assert (tmp_path / 'entry').read_bytes() == b'whole'


def test_the_next_write_removes_what_a_kill_left_behind(tmp_path):
  (tmp_path / 'summary.json.0123abcd.tmp').write_text('{"ste')
  write_json(tmp_path / 'summary.json', {'steps': 1})
  assert [path.name for path in tmp_path.iterdir()] == ['summary.json']


READERS = {
  'config.json': restore_config,
  'summary.json': lambda workdir: run_status(workdir, base_config()),
  'dataset.json': lambda workdir: restore_dataset_facts(workdir, channels=3),
  'exits.json': read_plan,
  'results.json': lambda workdir: load_results(workdir, Protocol('smoke', {})),
  'metrics.jsonl': read_metrics,
  'checkpoints/1/checksums.json': lambda workdir: Checkpoints(workdir).read_variables(1),
}


@pytest.mark.parametrize('name', READERS)
@pytest.mark.parametrize(
  ('make', 'reason'),
  [
    (Path.mkdir, 'Is a directory'),
    (os.mkfifo, 'Not a regular file'),
    (lambda path: path.symlink_to('/dev/zero'), 'Not a regular file'),
    (lambda path: path.symlink_to('nothing'), 'No such file or directory'),
    (lambda path: path.symlink_to(path), 'Too many levels of symbolic links'),
  ],
)
def test_every_file_of_a_run_has_to_be_a_file(tmp_path, name, make, reason):
  path = tmp_path / name
  path.parent.mkdir(parents=True, exist_ok=True)
  make(path)
  with pytest.raises(UserError) as error:
    READERS[name](tmp_path)
  assert str(error.value).startswith(f'{path} cannot be read ({reason}); ')


@pytest.mark.parametrize('name', [name for name in READERS if name.endswith('.json')])
def test_deep_nesting_in_every_json_file_of_a_run(tmp_path, name):
  (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / name).write_text('[' * 100_000)
  with pytest.raises(UserError, match=r'is not a JSON object \(maximum recursion depth|is damaged \(checksums.json\)'):
    READERS[name](tmp_path)


@pytest.mark.parametrize(
  ('content', 'reason'),
  [
    (b'[1]', 'it holds [1]'),
    (b'{"steps": ', 'Expecting value: line 1'),
    ('\x00\ufffd'.encode(), 'Expecting value'),
    (b'\xff\xfe\x00', "'utf-8' codec can't decode"),
    (b'{"a":' * 500 + b'0' + b'}' * 500, 'it is nested more than 50 levels deep'),
    (b'[' * 51 + b']' * 51, 'it is nested more than 50 levels deep'),
    (b'{"steps": ' + b'9' * 5000 + b'}', 'Exceeds the limit'),
  ],
)
def test_only_a_json_object_is_read(tmp_path, content, reason):
  (tmp_path / 'file').write_bytes(content)
  with pytest.raises(UserError) as error:
    read_object(tmp_path / 'file', 'fix it')
  assert str(error.value).startswith(f'{tmp_path}/file is not a JSON object ({reason}')
  assert str(error.value).endswith('); fix it')


@pytest.mark.parametrize('number', [errno.EACCES, errno.EIO])
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, number):
  path = tmp_path / 'dataset.json'
  path.write_text('{}')

  def refuse(path, *unused):  # Root may read everything.
    raise OSError(number, os.strerror(number), path)

  monkeypatch.setattr(os, 'open', refuse)
  with pytest.raises(UserError, match=rf'dataset.json cannot be read \({os.strerror(number)}\); fix it'):
    read_object(path, 'fix it')


def test_objects_are_read_through_links_and_a_missing_file_is_none(tmp_path):
  deep = '{"a":' * 50 + '0' + '}' * 50
  (tmp_path / 'target').write_text(deep)
  (tmp_path / 'link').symlink_to('target')
  assert read_object(tmp_path / 'link', '') == json.loads(deep)
  assert read_object(tmp_path / 'none', '') is read_object(tmp_path / 'target' / 'none', '') is None


def test_what_is_linked_from_a_temporary_name_is_not_overwritten(tmp_path):
  (tmp_path / 'mine').write_text('mine')
  (tmp_path / 'summary.json.0123abcd.tmp').symlink_to('mine')
  write_json(tmp_path / 'summary.json', {'steps': 1})
  assert contents(tmp_path) == {'mine': b'mine', 'summary.json': b'{\n  "steps": 1\n}\n'}


def test_checksums_find_a_changed_and_a_missing_file(tmp_path):
  (tmp_path / 'sub').mkdir()
  for name, text in {'a': 'hello', 'sub/b': 'world'}.items():
    (tmp_path / name).write_text(text)
  saved = file_checksums(tmp_path)
  assert saved == {'a': 0x3610A686, 'sub/b': 0x3A771143}
  (tmp_path / 'later').write_text('')
  assert damaged_file(tmp_path, saved) is None
  (tmp_path / 'sub/b').write_text('World')
  assert damaged_file(tmp_path, saved) == 'sub/b'
  (tmp_path / 'a').unlink()
  assert damaged_file(tmp_path, saved) == 'a'
