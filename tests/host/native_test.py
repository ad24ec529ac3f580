"""Libraries in C++: compiled once, kept, and left out where they cannot be."""

import ctypes
import os
import shutil
import subprocess

import pytest

from paranet_jax.host import native

needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='no g++')


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path / 'cache'))
  return tmp_path / 'cache/native'


@needs_compiler
def test_compiled_once_for_each_source_and_definition(tmp_path, cache, monkeypatch):
  source = tmp_path / 'answer.cc'
  source.write_text('extern "C" int answer() { return ANSWER; }')
  first = native.shared_library(source, {'ANSWER': 42}, str(tmp_path))
  assert first is not None
  (cache / f'{first.name}.0123abcd.tmp').write_bytes(b'of a process that was killed')
  first.unlink()
  assert native.shared_library(source, {'ANSWER': 42}, str(tmp_path)) == first
  assert ctypes.CDLL(str(first)).answer() == 42
  second = native.shared_library(source, {'ANSWER': 43}, str(tmp_path))
  assert ctypes.CDLL(str(second)).answer() == 43
  monkeypatch.setattr(native, '_run', None)
  assert native.shared_library(source, {'ANSWER': 42}, str(tmp_path)) == first
  assert sorted(cache.iterdir()) == sorted([first, second])


@needs_compiler
@pytest.mark.parametrize('cores', [1, 2])
def test_parts_are_one_library(tmp_path, monkeypatch, cores):
  source = tmp_path / 'answer.cc'
  source.write_text(
    '#if !defined(PART) || PART == 0\nextern "C" int first() { return ANSWER; }\n#endif\n'
    '#if !defined(PART) || PART == 1\nextern "C" int second() { return 2 * ANSWER; }\n#endif\n'
  )
  monkeypatch.setattr(native.os, 'sched_getaffinity', lambda _: set(range(cores)))
  commands = []
  monkeypatch.setattr(native, '_run', lambda command, run=native._run: (commands.append(command), run(command)))
  library = ctypes.CDLL(str(native.shared_library(source, {'ANSWER': 21}, str(tmp_path), ('PART', 2))))
  assert (library.first(), library.second(), len(commands)) == (21, 42, 2 * cores - 1)


@needs_compiler
def test_one_line_says_that_a_source_does_not_compile(tmp_path, cache, capsys):
  source = tmp_path / 'wrong.cc'
  source.write_text('#error no\n')
  assert native.shared_library(source, {}, str(tmp_path)) is None
  out = ''.join(capsys.readouterr())
  assert out.count('\n') == 1 and 'wrong.cc could not be compiled' in out and 'PARANET_NATIVE=off' in out
  assert list(cache.iterdir()) == []


@needs_compiler
def test_one_line_says_that_a_library_cannot_be_loaded(tmp_path, capsys):
  source = tmp_path / 'answer.cc'
  source.write_text('extern "C" int answer() { return 42; }')
  file = native.shared_library(source, {}, str(tmp_path))
  assert native.opened(file).answer() == 42
  file = file.with_name('damaged.so')  # The system keeps the other one loaded, by its name.
  file.write_bytes(b'\x7fELF')
  assert native.opened(file) is None
  out = ''.join(capsys.readouterr())
  assert out.count('\n') == 1 and f'{file}: file too short' in out and f'remove {file}, or set PARANET_CACHE_DIR' in out


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no FIFOs')
def test_a_compiler_that_does_not_end_is_ended_with_what_it_started(tmp_path, cache, monkeypatch, capsys):
  source, compiler, fifo = tmp_path / 'answer.cc', tmp_path / 'driver', tmp_path / 'fifo'
  source.write_text('')
  compiler.write_text(f'#!/bin/sh\nsh -c "exec 3>{fifo}; echo started >&3; sleep 5; echo outlived >&3"\n:\n')
  compiler.chmod(0o755)
  os.mkfifo(fifo)
  monkeypatch.setenv('CXX', str(compiler))
  told = []

  def communicate(process, input=None, timeout=None):
    told.append(fifo.open('rb', buffering=0))
    told.append(told[0].readline())
    raise subprocess.TimeoutExpired(process.args, timeout)

  monkeypatch.setattr(native.subprocess.Popen, 'communicate', communicate)
  assert native.shared_library(source, {}, str(tmp_path)) is None
  with told[0] as rest:
    assert (told[1], rest.read()) == (b'started\n', b'')  # Nothing writes any more.
  out = ''.join(capsys.readouterr())
  assert out.count('\n') == 1 and 'timed out after 120.0 seconds' in out and list(cache.iterdir()) == []


def test_no_place_to_keep_it(tmp_path, monkeypatch):
  source = tmp_path / 'answer.cc'
  source.write_text('')
  (tmp_path / 'cache').write_text('')
  assert native.shared_library(source, {}, str(tmp_path)) is None


@pytest.mark.parametrize(
  'system, machine, variables, expected',
  [
    ('Linux', 'x86_64', {}, None),
    ('Linux', 'x86_64', {'PARANET_NATIVE': 'off'}, 'PARANET_NATIVE is off'),
    ('Linux', 'aarch64', {}, 'Linux on aarch64'),
    ('Darwin', 'x86_64', {}, 'Darwin on x86_64'),
    ('Linux', 'x86_64', {'CXX': 'no-such-compiler'}, 'no compiler no-such-compiler'),
  ],
)
def test_where_libraries_are_used(system, machine, variables, expected, monkeypatch):
  monkeypatch.delenv('PARANET_NATIVE', raising=False)
  monkeypatch.setenv('CXX', 'sh')
  monkeypatch.setattr(native.platform, 'system', lambda: system)
  monkeypatch.setattr(native.platform, 'machine', lambda: machine)
  monkeypatch.setattr(native, 'cpu_features', lambda: frozenset({'one'}))
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert native.missing(['one']) == expected
  if expected is None:
    assert native.missing(['one', 'two']) == 'the processor has no two'
