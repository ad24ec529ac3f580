"""How a command ends: errors in one line, whatever the streams and the platform are."""

import sys
from unittest import mock

import jax
import pytest

from paranet_jax.host.errors import UserError, exit_code


def _fails() -> int:
  raise AssertionError


def test_a_platform_without_a_device_is_one_line(monkeypatch, capsys):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setattr(jax, 'devices', _fails)
  assert exit_code(_fails) == 2
  expected = 'error: expected the platform of JAX_PLATFORMS=cuda, found no such device; unset it\n'
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
