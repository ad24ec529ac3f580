"""This machine: its versions and devices, and compiled programs kept on disk for the next start."""

import datetime
import hashlib
import importlib.metadata
import math
import os
import platform
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import jax

from paranet_jax import __version__
from paranet_jax.host.arguments import absolute, cache_folder
from paranet_jax.host.known_faults import accept_wrong_numbers
from paranet_jax.host.starting import is_command

LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')

OFF = 'off'

_FEATURES = 'flags', 'Features'  # On x86 and on ARM.

_OF_JAX = 1.0
"""Seconds that a compilation must take for jax to keep it, unless the user says otherwise."""

_state = {'whole': False}

Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm] jaxlib has no stubs.


def start_jax(flags: Any) -> None:
  """Applies the flags of `arguments.add_jax_flags`; call it before anything is compiled."""
  accept_wrong_numbers(flags.accept_wrong_numbers)
  use_compilation_cache(flags.compilation_cache)
  _state['whole'] = is_command()


def keep_programs() -> None:
  """Turns the cache on in a user's own program, unless jax has another or none by the user's settings."""
  settings: Any = jax.config  # jax defines their names when it runs.
  if settings.jax_compilation_cache_dir is None and settings.jax_enable_compilation_cache:
    use_compilation_cache()
    _state['whole'] = True


def keeps_whole() -> bool:
  """Whether compiled programs are also kept for starts that trace nothing (see `kept_programs`)."""
  return _state['whole']


def use_compilation_cache(folder: str | None = None) -> Path | None:
  """Turns jax's persistent compilation cache on; call it before anything is compiled.

  An entry that cannot be read is compiled again: jax warns and continues.

  Args:
    folder: None: `compiled` in PARANET_CACHE_DIR (default ~/.cache/paranet_jax); 'off': no cache.

  Returns:
    The folder used, a subfolder for this kind of machine; None if the cache is off or not writable.
  """
  if folder == OFF:
    jax.config.update('jax_enable_compilation_cache', False)
    return None
  if not folder and not os.environ.get('PARANET_CACHE_DIR') and os.path.expanduser('~') == '~':
    return None
  path = (absolute(folder) if folder else cache_folder() / 'compiled') / machine_key()
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError:
    return None  # Training works without a cache.
  warnings.filterwarnings('ignore', 'Error writing persistent compilation cache')  # As on a full disk.
  jax.config.update('jax_compilation_cache_dir', str(path))
  settings: Any = jax.config  # jax defines their names when it runs.
  if settings.jax_persistent_cache_min_compile_time_secs == _OF_JAX:
    settings.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  return path


def machine_key(cpuinfo: Path = Path('/proc/cpuinfo')) -> str:
  """A hash of what compiled code depends on: the versions, and the CPU with its instruction sets.

  XLA compiles for the CPU it runs on. A program compiled on another machine may use instructions that this one lacks,
  and would crash the process.
  """
  names = 'model name', *_FEATURES
  features = {line for line in _lines(cpuinfo) if line.partition(':')[0].strip() in names}
  described = '\n'.join(
    [jax.__version__, importlib.metadata.version('jaxlib'), platform.machine(), platform.processor(), *sorted(features)]
  )
  return hashlib.sha256(described.encode()).hexdigest()[:16]


def usable_cores() -> int:
  """The CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def library_versions() -> dict[str, str]:
  """The versions of the libraries that results depend on, by name."""
  return {name: importlib.metadata.version(name) for name in LIBRARIES}


def environment(devices: list[Device]) -> dict[str, Any]:
  """Versions and device by which a measured number can be reproduced."""
  return {
    'versions': {'paranet_jax': __version__, 'python': platform.python_version(), **library_versions()},
    'device': {'platform': devices[0].platform, 'kind': devices[0].device_kind, 'count': len(devices)},
  }


def today() -> str:
  """The date of coordinated universal time, as in 2026-11-29."""
  return datetime.datetime.now(datetime.UTC).date().isoformat()


def device_memory(device: Device) -> float:
  """Bytes of a device; CPU devices share those of the machine, or of the container."""
  if device.platform == 'cpu':
    return min(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'), container_memory())
  return (device.memory_stats() or {}).get('bytes_limit', math.inf)


def container_memory(limit: Path = Path('/sys/fs/cgroup/memory.max')) -> float:
  """Bytes that this container may use; infinity: there is no limit."""
  text = ''.join(_lines(limit)).strip()
  return int(text) if text.isdecimal() else math.inf


def container_used(folder: Path = Path('/sys/fs/cgroup')) -> int:
  """Bytes that this container uses, without the files that it keeps in memory only while there is room."""
  used = ''.join(_lines(folder / 'memory.current')).strip()
  kept = dict(line.split(' ', 1) for line in _lines(folder / 'memory.stat') if ' ' in line).get('inactive_file', '0')
  return max(int(used) - int(kept), 0) if used.isdecimal() and kept.isdecimal() else 0


def cpu_name(cpuinfo: Path = Path('/proc/cpuinfo')) -> str:
  """Model name of this machine's processor."""
  names = [line.partition(':')[2].strip() for line in _lines(cpuinfo) if line.startswith('model name')]
  return names[0] if names else platform.processor() or platform.machine()


def cpu_features(cpuinfo: Path = Path('/proc/cpuinfo')) -> frozenset[str]:
  """The processor's instruction sets, by Linux's names."""
  lines = (line.partition(':') for line in _lines(cpuinfo))
  return frozenset(next((text.split() for name, _, text in lines if name.strip() in _FEATURES), ()))


def _lines(file: Path) -> list[str]:
  try:
    return file.read_text().splitlines()
  except OSError:
    return []
