"""The doctor: its report, its advice and its exit code."""

import json

import numpy as np
import pytest
from running import run_command

from paranet_jax.doctor import crashes, report
from paranet_jax.doctor.__main__ import main
from paranet_jax.host import arguments, native
from paranet_jax.models import numerics
from paranet_jax.models.layers import native_dense, native_inference

FIELDS = [
  'versions',
  'device',
  'processor',
  'kernels',
  'flags',
  'known_faults',
  'checks',
  'memory',
  'disk',
  'caches',
  'advice',
]
OTHER = '--xla_cpu_parallel_codegen_split_count=1'  # XLA aborts on a flag that it does not know.
AVOIDING = '--xla_cpu_experimental_ynn_fusion_type=-reduce'


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """A machine with jaxlib 0.10.2, one quick check, and nothing to advise."""
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path))
  monkeypatch.setenv('PARANET_NATIVE', 'off')  # Or two libraries would be compiled for each test.
  monkeypatch.setenv('XLA_FLAGS', f'{OTHER} {AVOIDING}')
  monkeypatch.setattr(report, 'jaxlib_version', lambda: (0, 10, 2))
  monkeypatch.setattr(report, 'crash', lambda rank: None)
  monkeypatch.setattr(report.os, 'getloadavg', lambda: (0.0, 0.0, 0.0))
  monkeypatch.setattr(report, 'ROOM', 0)
  monkeypatch.setattr(numerics, 'programs', lambda *_, **__: [numerics.summed_products(10)])
  (tmp_path / 'compiled').mkdir()
  (tmp_path / 'compiled' / 'program').write_bytes(bytes(1_500_000))
  return monkeypatch


def test_a_healthy_machine(machine, tmp_path):
  code, out, err = run_command(main, '--json')
  found = json.loads(out)
  assert (code, err, list(found)[: len(FIELDS)]) == (0, '', FIELDS)
  assert found['advice'] == [] and all(check['right'] for check in found['checks'])
  assert [fault['avoided'] for fault in found['known_faults']] == [True] * 3
  assert found['caches'] == {str(tmp_path / 'compiled'): 1_500_000}
  code, out, _ = run_command(main)
  assert code == 0 and out.endswith('to do        nothing\n')
  assert f'cache        1.5 MB in {tmp_path}/compiled\n' in out and f"XLA_FLAGS='{OTHER} " in out


def test_a_configuration_and_its_fields(machine):
  blended = '--config=paranet_jax:pn3_ddd', '--config.train.mixup=0.2', '--config.train.cutmix=1.0'
  code, _, err = run_command(main, *blended)
  assert code == 2 and err.endswith('set one of --config.train.mixup and --config.train.cutmix to 0\n'), err
  assert run_command(main, *blended, '--config.train.cutmix=0.0').code == 0
  code, _, err = run_command(main, '--config.train.cutmixx=0.0')
  assert code == 2 and err.startswith('error: unknown configuration field train.cutmixx; did you mean '), err


@pytest.mark.parametrize('broken', ['compiler', 'native_dense.cc', 'native_inference.cc', 'place', None])
def test_kernels_are_used_only_where_they_compile(machine, tmp_path, broken):
  compiler = tmp_path / 'compiler'
  compiler.write_text('#!/bin/sh\necho "error: no header" >&2\nexit 1\n')
  compiler.chmod(0o755)
  machine.delenv('PARANET_NATIVE')
  machine.setenv('CXX', str(compiler))
  machine.setattr(native, 'cpu_features', lambda: frozenset(native_dense.FEATURES))
  machine.setattr(native.platform, 'system', lambda: 'Linux')
  machine.setattr(native.platform, 'machine', lambda: 'x86_64')
  machine.setattr(native_dense, '_compiled', native_dense._compiled.__wrapped__)  # Without what other tests compiled.
  machine.setattr(native_inference, '_registered', native_inference._registered.__wrapped__)
  if broken == 'place':
    (tmp_path / 'native').write_text('')
  elif broken != 'compiler':
    for module in (native_dense, native_inference):
      machine.setattr(module, 'shared_library', lambda source, *_: None if source.name == broken else source)
      machine.setattr(module, 'opened', lambda file: file)
      machine.setattr(module, 'register', lambda *_: None)
  code, out, err = run_command(main, '--json')
  assert (code, json.loads(out)['kernels']) == (0, 'they cannot be compiled, kept or loaded' if broken else 'used')
  found = [line.split(':')[1].split()[0] for line in err.splitlines()]
  assert found == (['native_dense.cc', 'native_inference.cc'] if broken == 'compiler' else [])
  machine.setenv('CXX', 'no-such-compiler')
  assert json.loads(run_command(main, '--json').out)['kernels'] == 'no compiler no-such-compiler'
  machine.setattr(report.jax, 'default_backend', lambda: 'gpu')
  assert report._kernels() == 'jax computes on gpu'


def test_wrong_numbers_crashes_and_what_to_do(machine):
  right = numerics.summed_products(10)
  wrong = right._replace(compute=lambda: [2 * right.compute()[0]])
  machine.setattr(numerics, 'programs', lambda *_, **__: [wrong])
  machine.setattr(report, 'crash', lambda rank: 'ended by SIGSEGV' if rank == 8 else None)
  machine.setenv('XLA_FLAGS', OTHER)
  code, out, _ = run_command(main)
  assert code == 1
  assert 'WRONG: the sums of 10 vmapped matrix-vector products: expected 81, found 162\n' in out
  assert 'right: the sum of a product of arrays of 7 axes\n' in out
  assert 'CRASHES: the sum of a product of arrays of 8 axes: ended by SIGSEGV\n' in out
  assert out.count('known fault  NOT AVOIDED: ') == 3
  assert out.endswith(f'to do        add {AVOIDING} to XLA_FLAGS, or unset it and paranet_jax does\n')
  machine.setattr(report, 'jaxlib_version', lambda: (0, 13, 0))
  assert 'to do        install jaxlib 0.11.1 or newer, and report the output of --json\n' in run_command(main).out


def test_an_answer_that_is_not_a_number_is_null_in_json(machine):
  right = numerics.summed_products(10)
  machine.setattr(
    numerics, 'programs', lambda *_, **__: [right._replace(compute=lambda: [np.nan * right.compute()[0]])]
  )
  code, out, _ = run_command(main, '--json')
  check = json.loads(out, parse_constant=pytest.fail)['checks'][0]
  assert (code, check['right'], check['error'], check['found']) == (1, False, None, None)


def test_little_room_and_a_busy_processor(machine):
  machine.setattr(report, 'ROOM', 1 << 60)
  machine.setattr(report.os, 'getloadavg', lambda: (99.0, 0.0, 0.0))
  advice = json.loads(run_command(main, '--json').out)['advice']
  assert [text.split(':')[1] for text in advice[:-1]] == [' free some before training'] * (len(advice) - 1)
  assert len(advice) >= 2 and advice[-1] == 'other programs use the processor (load 99.0): measure no speed now'


def test_a_container_has_less_memory(machine):
  machine.setattr(report, 'container_memory', lambda: 5_000_000)
  machine.setattr(report, 'container_used', lambda: 3_000_000)
  assert json.loads(run_command(main, '--json').out)['memory'] == {'total': 5_000_000, 'available': 2_000_000}


def test_a_cache_whose_files_come_and_go(machine, tmp_path):
  gone, walk = tmp_path / 'compiled' / 'gone', report.os.walk
  gone.write_text('of another command')

  def walk_and_remove(folder):
    for listed in walk(folder):
      gone.unlink()
      yield listed

  machine.setattr(report.os, 'walk', walk_and_remove)
  assert report._caches() == {str(tmp_path / 'compiled'): 1_500_000}


def test_without_a_home_folder(machine, tmp_path):
  machine.chdir(tmp_path)
  machine.delenv('PARANET_CACHE_DIR')
  machine.setattr(arguments.os.path, 'expanduser', lambda path: path)
  code, out, err = run_command(main, '--json')
  found = json.loads(out)
  assert (code, err, list(found['disk']), found['caches']) == (0, '', [str(tmp_path)], {})


@pytest.mark.parametrize(
  ('flags', 'message'),
  [(['--config=no.py'], 'expected a configuration file at no.py, found none'), (['--jsn'], 'unrecognized arguments')],
)
def test_refusals(flags, message):
  code, out, err = run_command(main, *flags)
  assert (code, out, err.count('\n')) == (2, '', 1) and message in err


def test_a_configuration_that_cannot_fit(tmp_path):
  (tmp_path / 'huge.py').write_text(
    'from paranet_jax.configs import quickstart\n'
    'def get_config():\n'
    '  config = quickstart.get_config()\n'
    '  config.model.image_side = 10**6\n'
    '  return config\n'
  )
  code, out, err = run_command(main, f'--config={tmp_path}/huge.py')
  assert (code, out, err.count('\n')) == (2, '', 1) and 'model.image_side' in err


@pytest.mark.parametrize('rank', crashes.RANKS)
def test_programs_that_crash_some_versions_are_right_here(rank):
  crashes.sum_of_product(rank)


def test_a_crash_of_the_child_is_told_from_an_error(monkeypatch):
  class Process:
    exitcode = -11

    def __init__(self, target, args):
      assert (target, args) == (crashes.sum_of_product, (8,))

    def start(self): ...

    def join(self, seconds=None): ...

    def is_alive(self):
      return self.exitcode is None

    def kill(self): ...

  monkeypatch.setattr(crashes.multiprocessing, 'get_context', lambda method: type('Context', (), {'Process': Process}))
  for code, expected in ((-11, 'ended by SIGSEGV'), (1, 'exit code 1'), (0, None), (None, 'took more than 60 seconds')):
    Process.exitcode = code
    assert crashes.crash(8) == expected
