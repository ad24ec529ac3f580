"""Flags that avoid known faults of jaxlib, and the version that they are chosen by."""

import importlib.metadata
import os
import sys

import pytest

from paranet_jax.host.known_faults import (
  ACCEPT,
  KNOWN_FAULTS,
  accept_wrong_numbers,
  avoid_known_faults,
  faults_of,
  jaxlib_version,
  wrong_numbers_accepted,
)

NO_SUMS = '--xla_cpu_experimental_ynn_fusion_type=-reduce'


@pytest.mark.parametrize(
  ('version', 'given', 'flags'),
  [
    ('0.10.1', None, None),
    ('0.10.2', None, NO_SUMS),
    ('0.10.2', '--xla_force_host_platform_device_count=2', f'--xla_force_host_platform_device_count=2 {NO_SUMS}'),
    ('0.10.2', '--xla_cpu_experimental_ynn_fusion_type=reduce', '--xla_cpu_experimental_ynn_fusion_type=reduce'),
    ('0.10.2', '--xla_cpu_experimental_ynn_fusion_type=', '--xla_cpu_experimental_ynn_fusion_type='),
    ('0.11.0', None, NO_SUMS),
    ('0.11.1', None, None),
    ('0.12.0.dev20261101', '--xla_dump_to=/x', '--xla_dump_to=/x'),
    (None, None, None),
  ],
)
def test_flags_of_a_version_respect_the_users_own(monkeypatch, tmp_path, version, given, flags):
  if version:
    (tmp_path / 'jaxlib').mkdir()
    (tmp_path / f'jaxlib-{version}.dist-info').mkdir()
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  monkeypatch.delitem(sys.modules, 'jaxlib')
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  if given is not None:
    monkeypatch.setenv('XLA_FLAGS', given)
  avoid_known_faults()
  assert os.environ.get('XLA_FLAGS') == flags


@pytest.mark.parametrize(('before', 'accept', 'after'), [(None, False, None), (None, True, '1'), ('1', False, '1')])
def test_wrong_numbers_stay_accepted(monkeypatch, before, accept, after):
  monkeypatch.setenv(ACCEPT, before or '')
  if before is None:
    monkeypatch.delenv(ACCEPT)
  accept_wrong_numbers(accept)
  assert os.environ.get(ACCEPT) == after and wrong_numbers_accepted() == (after == '1')


def test_a_folder_that_may_not_be_entered_is_passed_over(monkeypatch, tmp_path):
  stat, closed = os.stat, str(tmp_path / 'closed')

  def refuse(path, *arguments, **options):
    if os.fspath(path).startswith(closed):
      raise PermissionError(13, 'Permission denied', path)
    return stat(path, *arguments, **options)

  monkeypatch.setattr(os, 'stat', refuse)  # The tests' user may enter any folder, if it is root.
  monkeypatch.setattr(sys, 'path', [closed, *sys.path])
  assert '.'.join(map(str, jaxlib_version())) == importlib.metadata.version('jaxlib')


def test_installed_version_is_found_without_importing_it():
  assert list(jaxlib_version()) == [int(part) for part in importlib.metadata.version('jaxlib').split('.')[:3]]


def test_each_fault_names_an_issue_and_ends():
  assert [fault.issue[-5:] for fault in KNOWN_FAULTS] == ['39103', '40412', '39257']
  assert [len(faults_of(version)) for version in ((0, 10, 1), (0, 10, 2), (0, 11, 0), (0, 11, 1), None)] == [
    0,
    3,
    1,
    0,
    0,
  ]
