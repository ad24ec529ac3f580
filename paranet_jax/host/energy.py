"""The energy that this machine uses, in joules, where it says so: RAPL of processors, NVML of NVIDIA's GPUs."""

import importlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

POWERCAP = Path('/sys/class/powercap')
"""Where Linux shows the counters of processors."""


class Counter(NamedTuple):
  """A counter of energy.

  Attributes:
    name: of what it counts.
    read: joules since some time ago.
    wraps_at: where it starts again at 0, in joules; None: never.
  """

  name: str
  read: Callable[[], float]
  wraps_at: float | None = None


class Energy:
  """Joules used by what the counters count, whatever program uses them, idle power included.

  Attributes:
    sources: names of the counters.
  """

  def __init__(self, counters: list[Counter]):
    self.sources = tuple(counter.name for counter in counters)
    self._counters, self._last, self._total = counters, [counter.read() for counter in counters], 0.0

  def joules(self) -> float:
    """Joules since this object was made. A counter that wrapped since the last call counts on, if it wrapped once.

    Counters of processors wrap after minutes to hours, so call it more often than that.
    """
    for place, counter in enumerate(self._counters):
      now = counter.read()
      used = now - self._last[place]
      if used < 0 and counter.wraps_at is not None:
        used += counter.wraps_at
      self._last[place], self._total = now, self._total + max(used, 0.0)
    return self._total

  def a_call(self, function: Callable[[], Any], seconds: float) -> float:
    """Joules of a call, the mean over so many calls as take this long; counters move about every millisecond."""
    function()
    calls, before, started = 0, self.joules(), time.perf_counter()
    while not calls or time.perf_counter() - started < seconds:
      function()
      calls += 1
    return (self.joules() - before) / calls


def find_energy(gpu: bool, powercap: Path = POWERCAP, environ: Mapping[str, str] = os.environ) -> Energy | str:
  """What tells this machine's energy; if nothing does, a line that says why.

  Args:
    gpu: count GPUs, too: those that CUDA_VISIBLE_DEVICES names, or all.
    powercap: the root folder of the counters of processors.
    environ: environment variables.
  """
  counters, why = _processors(powercap)
  if gpu:
    more, why_not = _gpus(environ.get('CUDA_VISIBLE_DEVICES'))
    if not more:  # A processor that feeds a GPU uses the smaller part of the energy.
      return f'this machine does not say how much energy it uses: {why_not}'
    counters += more
  return Energy(counters) if counters else f'this machine does not say how much energy it uses: {why}'


def _processors(powercap: Path) -> tuple[list[Counter], str]:
  """The counter of each processor package, and why there is none.

  Zones of Linux's powercap interface (https://docs.kernel.org/power/powercap/powercap.html) are named intel-rapl:N, on
  AMD's processors, too. Their parts, intel-rapl:N:M, are counted in them, and so are they in psys, the whole board.
  """
  counters, locked = [], None
  for zone in sorted(powercap.glob('intel-rapl:*')):
    if ':' in zone.name.removeprefix('intel-rapl:'):
      continue
    try:
      name = (zone / 'name').read_text().strip()
      if not name.startswith('package'):
        continue
      most = int((zone / 'max_energy_range_uj').read_text())
      counter = Counter(name, lambda file=zone / 'energy_uj': int(file.read_text()) / 1e6, most / 1e6)
      counter.read()
    except PermissionError:  # Only root may, since counters revealed secrets (CVE-2020-8694).
      locked = zone / 'energy_uj'
    except (OSError, ValueError):
      continue
    else:
      counters.append(counter)
  if locked:  # The sum would lack a package.
    return [], f'{locked} may be read by root only (sudo chmod a+r {powercap}/intel-rapl:*/energy_uj)'
  return counters, f'there is no counter of a processor (RAPL) in {powercap}'


def _gpus(visible: str | None) -> tuple[list[Counter], str]:
  """The counter of each GPU that a program sees, and why there is none. visible: CUDA_VISIBLE_DEVICES."""
  try:
    nvml = importlib.import_module('pynvml')
  except ImportError:
    return [], 'there is no NVML; pip install nvidia-ml-py'
  try:
    nvml.nvmlInit()
    names = visible.split(',') if visible else list(map(str, range(nvml.nvmlDeviceGetCount())))
    counters = []
    for name in names:
      by_index = name.strip().isdecimal()
      find = nvml.nvmlDeviceGetHandleByIndex if by_index else nvml.nvmlDeviceGetHandleByUUID
      device = find(int(name) if by_index else name.strip())
      counter = Counter(
        f'GPU {name.strip()}', lambda device=device: nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3
      )
      counter.read()  # GPUs before Volta have none.
      counters.append(counter)
  except nvml.NVMLError as error:
    return [], f'NVML says {error}'
  return counters, 'NVML names no GPU'
