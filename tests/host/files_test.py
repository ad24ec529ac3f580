import os

import pytest

from paranet_jax.host.files import damaged_file, file_checksums, read_object, replacing, write_json


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
  assert read_object(path) == {'steps': 1}
  assert list(tmp_path.iterdir()) == [path]


def test_the_last_of_two_writers_wins(tmp_path):
  path = tmp_path / 'entry'
  with replacing(path, 'wb', shared=True) as first:
    with replacing(path, 'wb', shared=True) as second:
      second.write(b'second')
    first.write(b'first')
  assert path.read_bytes() == b'first'
  assert list(tmp_path.iterdir()) == [path]


def test_the_next_write_removes_what_a_kill_left_behind(tmp_path):
  (tmp_path / 'summary.json.tmp').write_text('{"ste')
  write_json(tmp_path / 'summary.json', {'steps': 1})
  assert [path.name for path in tmp_path.iterdir()] == ['summary.json']


def test_only_a_json_object_is_read(tmp_path):
  (tmp_path / 'list').write_text('[1]')
  with pytest.raises(ValueError, match=r'it holds \[1\]'):
    read_object(tmp_path / 'list')


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
