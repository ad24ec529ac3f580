"""How a command ends: errors in one line, whatever the streams and the platform are."""

import sys

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
