"""How a command ends: errors in one line, whatever the streams and the platform are."""

import errno
import io
import logging
import os
import subprocess
import sys
from unittest import mock

import jax
import pytest

from paranet_jax.host.errors import UserError, exit_code, report_no_room, say
from paranet_jax.host.files import write_text


def _fails() -> int:
  raise AssertionError


@pytest.mark.parametrize('setting', ['JAX_PLATFORMS', 'JAX_PLATFORM_NAME', 'JAX_NUM_CPU_DEVICES'])
def test_a_platform_without_a_device_is_one_line(monkeypatch, capsys, setting):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setenv(setting, 'cuda')
  monkeypatch.setattr(jax, 'devices', _fails)
  assert exit_code(_fails) == 2
  expected = f'error: expected the platform of {setting}=cuda, found no such device; unset it\n'
  assert capsys.readouterr().err == expected


def test_a_file_that_may_not_be_used_is_one_line(tmp_path, capsys):
  def command():
    raise PermissionError(13, 'Permission denied', f'{tmp_path}/\x1b')

  assert exit_code(command) == 2
  expected = f'error: {tmp_path}/\\x1b cannot be read or written (Permission denied); fix that, or name another path\n'
  assert capsys.readouterr().err == expected


@pytest.mark.parametrize('error', [OSError(5, 'Input/output error'), OSError(9, 'Bad file descriptor', 3)])
def test_another_failure_of_the_system_stays_a_traceback(error):
  with pytest.raises(OSError, match=error.strerror):
    exit_code(mock.Mock(side_effect=error))


def test_another_failure_stays_a_traceback(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  with pytest.raises(AssertionError):
    exit_code(_fails)


@pytest.mark.parametrize('closed', [('stdout',), ('stderr',), ('stdout', 'stderr')])
def test_closed_streams_do_not_stop_a_command(closed, monkeypatch):
  for name in closed:
    monkeypatch.setattr(sys, name, None)

  def command():
    print('text', flush=True)
    raise UserError('wrong')

  assert exit_code(command) == 2
  for name in closed:
    getattr(sys, name).close()


ODD = 'caf\udce9 \x1b[31mred\r \x07'
ESCAPED = r'caf\udce9 \x1b[31mred\r \x07'


def test_what_is_printed_controls_no_terminal(capsys, monkeypatch):
  monkeypatch.setattr(logging.root, 'handlers', [])

  def command():
    say(f'a {ODD}\nb')
    logging.warning('c %s\n', ODD)
    raise UserError(f'd {ODD}')

  assert exit_code(command) == 2
  out, err = capsys.readouterr()
  assert out == f'a {ESCAPED}\nb\n'
  assert err.splitlines() == [f'WARNING:root:c {ESCAPED}\\n', r'error: d caf\udce9 \x1b[31mred \x07']


class Full(io.StringIO):
  """A stream that nothing can be written to."""

  number = errno.ENOSPC

  def write(self, text):
    raise OSError(self.number, os.strerror(self.number))

  def fileno(self):
    return os.open(os.devnull, os.O_WRONLY)


class Closed(Full):
  number = errno.EPIPE


def test_streams_that_take_nothing(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stdout', Full())
  assert exit_code(lambda: say('text')) == 2
  expected = 'error: standard output cannot be written (No space left on device); make room, or send it elsewhere\n'
  assert capsys.readouterr().err == expected
  monkeypatch.setattr(sys, 'stdout', Closed())
  assert exit_code(lambda: say('text')) == 141
  assert capsys.readouterr().err == ''


def test_standard_output_of_ascii(monkeypatch):
  out = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
  monkeypatch.setattr(sys, 'stdout', out)
  assert exit_code(lambda: say('caf\u00e9 \u2014')) == 0
  assert out.buffer.getvalue() == b'caf\\xe9 \\u2014\n'


CODE = """
import contextlib, os, sys
from paranet_jax.host.errors import UserError, exit_code, report_no_room, say
def command():
  with open('file', 'w') as file:
    with contextlib.suppress(OSError):
      os.write(1, b'from C ')
    file.write('content')
  say('lines')
  raise UserError('wrong')
sys.exit(exit_code(command))
"""


@pytest.mark.parametrize(
  ('redirected', 'shown'),
  [
    ('>&-', 'error: wrong\n'),
    ('>&- 2>&-', ''),
    ('<&- >&- 2>&-', ''),
    ('2>&-', 'from C lines\n'),
    ('2>/dev/full', 'from C lines\n'),
    (
      '>/dev/full',
      'error: standard output cannot be written (No space left on device); make room, or send it elsewhere\n',
    ),
  ],
)
def test_redirected_streams(tmp_path, redirected, shown):
  (tmp_path / 'code.py').write_text(CODE)
  line = f'{sys.executable} code.py {redirected}'
  environment = os.environ | {'PYTHONPATH': os.getcwd()}
  done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert (done.returncode, done.stdout + done.stderr) == (2, shown)
  assert (tmp_path / 'file').read_text() == 'content'


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES])
def test_only_a_lack_of_room_is_reported_as_one(tmp_path, number):
  room = number not in (errno.EIO, errno.EACCES)
  with pytest.raises(UserError if room else OSError) as error, report_no_room(tmp_path):
    raise OSError(number, os.strerror(number))
  if room:
    assert str(error.value) == (
      f'{tmp_path} cannot be written ({os.strerror(number)}), and its checkpoints are intact; make room, and the same '
      'command resumes'
    )


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, capsys, monkeypatch):
  def command():
    with open('/dev/full', 'w', buffering=1) as full:
      monkeypatch.setattr(type(tmp_path), 'open', lambda path, *unused, **options: (path.touch(), full)[1])
      write_text(tmp_path / 'exits.json', '{}\n')

  assert exit_code(command) == 2
  assert not list(tmp_path.iterdir())
  expected = f'error: {tmp_path}/exits.json cannot be read or written (No space left on device)'
  assert capsys.readouterr().err == f'{expected}; fix that, or name another path\n'


@pytest.mark.parametrize(
  ('text', 'shown'),
  [
    (
      'fix or remove it, or set --config.data.on_corrupt=skip',
      'fix or remove it, or set data.on_corrupt=skip in the config.json of the run',
    ),
    ('set --config.train.devices; then', 'set train.devices in the config.json of the run; then'),
    (
      'set --config.loss.distill, or --config.loss.teacher=network',
      'set loss.distill in the config.json of the run, or loss.teacher=network',
    ),
    ('lower --config.train.batch_size or .eval.batch_size', 'lower train.batch_size or .eval.batch_size'),
    ('train it with a larger --config.data.held_out', 'train it with a larger --config.data.held_out'),
    ('train a new run with --config.data.held_out=9', 'train a new run with --config.data.held_out=9'),
  ],
)
def test_a_command_without_config_names_the_place_of_a_field(text, shown, capsys):
  def command():
    raise UserError(text)

  assert exit_code(command, has_config=False) == exit_code(command) == 2
  assert capsys.readouterr().err == f'error: {shown}\nerror: {text}\n'


@pytest.mark.parametrize(
  ('name', 'value', 'default', 'ignored'),
  [
    ('jax_numpy_rank_promotion', 'raise', 'allow', True),
    ('jax_numpy_dtype_promotion', 'strict', 'standard', True),
    ('jax_transfer_guard', 'disallow', None, True),
    ('jax_transfer_guard_host_to_device', 'disallow_explicit', None, True),
    ('jax_transfer_guard_device_to_host', 'log', None, False),
    ('jax_debug_nans', True, False, True),
    ('jax_debug_infs', True, False, True),
    ('jax_debug_key_reuse', True, False, True),
    ('jax_enable_x64', True, False, True),
    ('jax_disable_jit', True, False, True),
    ('jax_check_tracer_leaks', True, False, True),
    ('jax_no_tracing', True, False, True),
    ('jax_no_execution', True, False, True),
    ('jax_debug_nans', False, False, False),
    ('jax_threefry_partitionable', False, True, True),
    ('jax_threefry_partitionable', True, True, False),
    ('jax_random_seed_offset', 7, 0, True),
    ('jax_random_seed_offset', 0, 0, False),
    ('jax_default_prng_impl', 'rbg', 'threefry2x32', True),
    ('jax_transfer_guard', 'log', None, False),
  ],
)
def test_debugging_settings_of_jax_do_not_reach_a_command(name, value, default, ignored, monkeypatch, capsys):
  monkeypatch.setenv(name.upper(), str(value))
  before = getattr(jax.config, name)
  found = []
  try:
    jax.config.update(name, value)
    assert exit_code(lambda: found.append(getattr(jax.config, name))) == 0
  finally:
    jax.config.update(name, before)
  line = f'{name.upper()}={value} is ignored: commands run with the default settings of jax\n'
  assert capsys.readouterr().err == line * ignored
  assert found == [default if ignored else value]
  assert (name.upper() in os.environ) == (not ignored)


def test_a_value_that_jax_refuses_when_it_is_imported(monkeypatch, capsys):
  def run():
    raise ValueError("invalid truth value 'bogus' for environment 'JAX_ENABLE_CHECKS'")

  with pytest.raises(ValueError):  # jax is imported, so the error is another's.
    exit_code(run)
  monkeypatch.setenv('JAX_LOG_COMPILES', '0')
  monkeypatch.delitem(sys.modules, 'jax')
  assert exit_code(run) == 2
  assert capsys.readouterr().err == (
    "error: expected a value that jax takes, found: invalid truth value 'bogus' for environment 'JAX_ENABLE_CHECKS'; "
    'unset that JAX_... variable\n'
  )
