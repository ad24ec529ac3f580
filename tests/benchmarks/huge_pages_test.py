"""Whatever is measured in a process of its own has there what its users have: only ours asks for huge pages."""

import argparse
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import deploy, fresh_process, service
from paranet_jax.host.huge_pages import VARIABLE

ASKED = 'glibc.malloc.hugetlb=1'


@pytest.fixture
def seen(monkeypatch):
  """What each process that a benchmark starts finds in the variable."""
  seen = []

  def run(command, env=None, **_):
    seen.append((os.environ if env is None else env).get(VARIABLE))
    return SimpleNamespace(stdout='{}')

  monkeypatch.setenv(VARIABLE, ASKED)
  for module in (deploy, fresh_process, service):
    monkeypatch.setattr(module.subprocess, 'run', run)
  yield seen
  assert os.environ[VARIABLE] == ASKED


@pytest.mark.parametrize('kind, asked', [('ours', ASKED), ('eager', None), ('onnxruntime', None)])
def test_start_and_memory_of_a_runtime(seen, monkeypatch, kind, asked):
  monkeypatch.setattr(deploy, '_size', lambda *_: 0)
  deploy.started(kind, Path('folder'), SimpleNamespace(plan=SimpleNamespace(exits=(1, 2))))
  assert seen == [asked] * 2


@pytest.mark.parametrize('task, asked', [('ours', ASKED), ('linen', ASKED), ('eager', None), ('compile', None)])
def test_the_first_step(seen, task, asked):
  fresh_process.in_fresh_process(task, fresh_process.Size())
  assert seen == [asked]


def test_the_service_and_run(seen, monkeypatch):
  monkeypatch.setattr(service, '_measure', lambda *_: service._in_process('run', 'bundle'))
  assert service.measure(argparse.Namespace(bundle=Path('bundle'))) == {'rows': [{}]}
  assert seen == [None]
