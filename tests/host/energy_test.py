"""What tells the energy of a machine, on a recorded tree of Linux's powercap interface, and on an NVML of our own."""

import sys
import types

import pytest

from paranet_jax.host import energy as energy_lib
from paranet_jax.host.energy import Energy, find_energy

MOST = 262_143_328_850  # As of an Intel Xeon.
NO = 'this machine does not say how much energy it uses: '
# Two packages, their parts, the whole board, and the same package by another interface.
RECORDED = {
  'intel-rapl:0': ('package-0', 1_000_000),
  'intel-rapl:0:0': ('core', 400_000),
  'intel-rapl:0:1': ('dram', 100_000),
  'intel-rapl:1': ('package-1', MOST - 2_000_000),
  'intel-rapl:2': ('psys', 9_000_000),
  'intel-rapl-mmio:0': ('package-0', 1_000_000),
}


@pytest.fixture
def powercap(tmp_path):
  for zone, (name, used) in RECORDED.items():
    (tmp_path / zone).mkdir()
    (tmp_path / zone / 'name').write_text(f'{name}\n')
    (tmp_path / zone / 'energy_uj').write_text(f'{used}\n')
    (tmp_path / zone / 'max_energy_range_uj').write_text(f'{MOST}\n')
  (tmp_path / 'intel-rapl').mkdir()
  (tmp_path / 'intel-rapl/enabled').write_text('1\n')
  return tmp_path


def use(powercap, **microjoules):
  for zone, value in microjoules.items():
    (powercap / zone.replace('_', ':').replace('rapl:', 'intel-rapl:') / 'energy_uj').write_text(f'{value}\n')


def test_packages_are_added_and_wrap_around(powercap):
  energy = find_energy(False, powercap)
  assert isinstance(energy, Energy) and energy.sources == ('package-0', 'package-1') and energy.joules() == 0
  use(powercap, rapl_0=1_500_000)
  assert energy.joules() == pytest.approx(0.5)
  use(powercap, rapl_1=1_000_000)  # It passed its largest value: 2 J up to there, and 1 J.
  assert energy.joules() == pytest.approx(3.5)
  use(powercap, rapl_0=500_000, rapl_1=1_250_000)
  assert energy.joules() == pytest.approx(3.5 + (MOST - 1_000_000) / 1e6 + 0.25)


def test_the_energy_of_a_call(powercap, monkeypatch):
  energy, clock, calls = find_energy(False, powercap), iter(range(100)), []

  def function():
    calls.append(1)
    use(powercap, rapl_0=1_000_000 + 250_000 * len(calls))

  monkeypatch.setattr(energy_lib.time, 'perf_counter', lambda: next(clock))
  assert energy.a_call(function, 4) == pytest.approx(0.25)
  assert len(calls) == 5  # One that does not count, and as many as take 4 seconds.


def test_without_permission(powercap, monkeypatch):
  read = energy_lib.Path.read_text

  def locked(path):
    if path == powercap / 'intel-rapl:1/energy_uj':
      raise PermissionError
    return read(path)

  monkeypatch.setattr(energy_lib.Path, 'read_text', locked)
  assert find_energy(False, powercap) == (
    f'{NO}{powercap}/intel-rapl:1/energy_uj may be read by root only (sudo chmod a+r {powercap}/intel-rapl:*/energy_uj)'
  )


@pytest.mark.parametrize('damage', ['gone', 'text', 'lost'])
def test_a_tree_that_tells_nothing(powercap, damage):
  for zone in ('intel-rapl:0', 'intel-rapl:1'):
    if damage == 'lost':
      (powercap / zone / 'max_energy_range_uj').unlink()
    else:
      (powercap / zone / 'energy_uj').write_text('' if damage == 'gone' else 'many')
  assert find_energy(False, powercap) == f'{NO}there is no counter of a processor (RAPL) in {powercap}'
  assert find_energy(False, powercap / 'none').startswith(NO)


@pytest.fixture
def nvml(monkeypatch):
  """An NVML with two GPUs that have used 5 and 7 J."""

  class NVMLError(Exception):
    pass

  used = {0: 5000, 1: 7000, 'GPU-b': 7000}
  module = types.SimpleNamespace(
    NVMLError=NVMLError,
    used=used,
    nvmlInit=lambda: None,
    nvmlDeviceGetCount=lambda: 2,
    nvmlDeviceGetHandleByIndex=lambda index: index,
    nvmlDeviceGetHandleByUUID=lambda name: name,
    nvmlDeviceGetTotalEnergyConsumption=lambda device: used[device],
  )
  monkeypatch.setitem(sys.modules, 'pynvml', module)
  return module


@pytest.mark.parametrize(
  ('visible', 'sources', 'joules'), [(None, ['0', '1'], 3.0), ('1', ['1'], 2.0), ('GPU-b', ['GPU-b'], 2.0)]
)
def test_gpus(powercap, nvml, visible, sources, joules):
  energy = find_energy(True, powercap, {} if visible is None else {'CUDA_VISIBLE_DEVICES': visible})
  assert isinstance(energy, Energy) and energy.sources == ('package-0', 'package-1', *(f'GPU {s}' for s in sources))
  nvml.used.update({0: 6000, 1: 9000, 'GPU-b': 9000})
  assert energy.joules() == pytest.approx(joules)


def test_gpus_that_tell_nothing(powercap, nvml, monkeypatch):
  def fails(device):
    raise nvml.NVMLError('Not Supported')

  nvml.nvmlDeviceGetTotalEnergyConsumption = fails
  assert find_energy(True, powercap, {}) == f'{NO}NVML says Not Supported'
  monkeypatch.setitem(sys.modules, 'pynvml', None)
  assert find_energy(True, powercap, {}) == f'{NO}there is no NVML; pip install nvidia-ml-py'
