"""What the doctor finds, as one JSON object, and the same as text."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from paranet_jax.command_line import CONFIGS, load_config, override
from paranet_jax.config import build_model, image_shape, validate
from paranet_jax.devices import check_fits
from paranet_jax.doctor.crashes import RANKS, crash
from paranet_jax.host.arguments import cache_folder
from paranet_jax.host.errors import UserError
from paranet_jax.host.huge_pages import VARIABLE as GLIBC_TUNABLES
from paranet_jax.host.known_faults import KNOWN_FAULTS, VARIABLE, faults_of, jaxlib_version
from paranet_jax.host.machine import container_memory, container_used, cpu_features, cpu_name, environment, usable_cores
from paranet_jax.models import numerics
from paranet_jax.models.layers import native_dense, native_inference

FEATURES = ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16', 'amx_int8', 'asimd', 'bf16', 'sve')
"""Instruction sets that decide how fast products are, as Linux names them."""

GIB = 1 << 30
ROOM = 2 * GIB
"""Free memory and disk below which advice is given."""

CLASSES = 100


def examine(config: str | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """Examines the machine.

  Args:
    config: as `--config` of `main`: the checks run at its shapes; None: those of the quickstart.
    overrides: `--config.section.field=value`, as of `main`.

  Returns:
    `versions`, `device`, `processor`, `kernels` ('used', or why they are not), `flags`, `known_faults`, `checks`,
    `memory`, `disk`, `caches` (bytes), and `advice`: one sentence for each thing to do.
  """
  flags = os.environ.get(VARIABLE, '')
  found = environment(jax.local_devices()) | {
    'processor': {
      'name': cpu_name(),
      'features': [name for name in FEATURES if name in cpu_features()],
      'cores': usable_cores(),
      'load': round(os.getloadavg()[0], 2),
    },
    'kernels': _kernels(),
    'flags': {name: value for name, value in sorted(os.environ.items()) if _decides(name)},
    'known_faults': [
      {'what': fault.what, 'issue': fault.issue, 'flag': fault.flag, 'avoided': fault.flag in flags}
      for fault in faults_of(jaxlib_version())
    ],
    'checks': _checks(config, overrides),
    'memory': _memory(),
    'disk': {str(folder): shutil.disk_usage(_existing(folder)).free for folder in _folders()},
    'caches': _caches(),
  }
  return found | {'advice': _advice(found)}


def _kernels() -> str:
  """'used', or why the kernels in C++ are not; those of PN3-ddd are compiled and loaded, and kept for later."""
  if (platform := jax.default_backend()) != 'cpu':
    return f'jax computes on {platform}'
  if reason := native_dense.missing(native_dense.FEATURES):
    return reason
  training = native_dense.passes(48, 12, jnp.float32)
  inference = native_inference.pooling_kernels((64, 32, 32, 24), jnp.float32)
  return 'used' if training and inference else 'they cannot be compiled, kept or loaded'


def _decides(name: str) -> bool:
  return name in (VARIABLE, GLIBC_TUNABLES) or name.startswith('JAX_')


def _checks(config: str | None, overrides: Sequence[str]) -> list[dict[str, Any]]:
  given = load_config(config or str(CONFIGS / 'quickstart.py'))
  override(given, overrides)
  validate(given)
  check_fits(given, jax.local_devices()[:1])
  model = build_model(given, given.model.num_classes or CLASSES)
  checks = []
  for program in numerics.programs(model, image_shape(given), given.train.batch_size, train=True):
    finding = numerics.measure(program)
    checks.append(
      {'program': program.name, 'right': finding.right, 'error': finding.error}
      | ({} if finding.right else {'found': finding.found, 'expected': finding.expected})
    )
  for rank in RANKS:
    failure = crash(rank)
    checks.append(
      {'program': f'the sum of a product of arrays of {rank} axes', 'right': failure is None}
      | ({'failure': failure} if failure else {})
    )
  return checks


def _memory() -> dict[str, int]:
  """Bytes of this machine, or of the container if it has fewer."""
  kib = {}
  for line in Path('/proc/meminfo').read_text().splitlines() if sys.platform == 'linux' else ():
    name, _, rest = line.partition(':')
    kib[name] = int(rest.split()[0])
  memory = {'total': 1024 * kib['MemTotal'], 'available': 1024 * kib['MemAvailable']} if kib else {}
  if memory and (limit := container_memory()) < memory['total']:
    memory = {'total': int(limit), 'available': min(memory['available'], max(int(limit) - container_used(), 0))}
  return memory


def _folders() -> list[Path]:
  try:
    return [Path.cwd(), cache_folder()]
  except UserError:  # No home folder.
    return [Path.cwd()]


def _caches() -> dict[str, int]:
  return {
    str(folder): sum(_size(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names)
    for cache in _folders()[1:]
    for folder in (sorted(cache.iterdir()) if cache.is_dir() else ())
    if folder.is_dir()
  }


def _size(file: str) -> int:
  try:
    return os.stat(file).st_size
  except OSError:  # Another command has just replaced it, or a link leads nowhere.
    return 0


def _existing(folder: Path) -> Path:
  return next(path for path in (folder, *folder.parents) if path.exists())


def _advice(found: dict[str, Any]) -> list[str]:
  advice = []
  wrong = [check['program'] for check in found['checks'] if not check['right']]
  missing = sorted({fault['flag'] for fault in found['known_faults'] if not fault['avoided']})
  if wrong and missing:
    advice.append(f'add {" ".join(missing)} to {VARIABLE}, or unset it and paranet_jax does')
  elif wrong:
    newest = '.'.join(map(str, max(fault.fixed for fault in KNOWN_FAULTS)))
    advice.append(f'install jaxlib {newest} or newer, and report the output of --json')
  for what, free in (('memory', found['memory'].get('available')), *found['disk'].items()):
    if free is not None and free < ROOM:
      advice.append(f'{free / GIB:.1f} GiB are free in {what}: free some before training')
  processor = found['processor']
  if processor['load'] > 0.5 * (processor['cores'] or 1):
    advice.append(f'other programs use the processor (load {processor["load"]}): measure no speed now')
  return advice


def as_text(found: dict[str, Any]) -> str:
  """The report for a person."""
  processor, device = found['processor'], found['device']
  lines = [
    ('versions', ', '.join(f'{name} {version}' for name, version in found['versions'].items())),
    ('devices', f'{device["count"]} {device["platform"]} ({device["kind"]})'),
    ('processor', f'{processor["name"]}, {processor["cores"]} cores, load {processor["load"]}'),
    ('', ' '.join(processor['features']) or 'no instruction set that matters'),
    ('C++ kernels', found['kernels']),
    ('flags', ' '.join(f"{name}='{value}'" for name, value in found['flags'].items()) or 'none'),
    ('memory', f'{found["memory"]["available"] / GIB:.1f} of {found["memory"]["total"] / GIB:.1f} GiB free')
    if found['memory']
    else ('memory', 'unknown'),
    *(('disk', f'{free / GIB:.1f} GiB free in {folder}') for folder, free in found['disk'].items()),
    *(('cache', f'{size / 1e6:.1f} MB in {folder}') for folder, size in found['caches'].items()),
    *(
      ('known fault', f'{"avoided" if fault["avoided"] else "NOT AVOIDED"}: {fault["what"]} ({fault["issue"]})')
      for fault in found['known_faults']
    ),
    *(('check', _check_line(check)) for check in found['checks']),
    *(('to do', advice) for advice in found['advice'] or ['nothing']),
  ]
  return '\n'.join(f'{name:<12} {text}' for name, text in lines)


def _check_line(check: dict[str, Any]) -> str:
  if 'failure' in check:
    return f'CRASHES: {check["program"]}: {check["failure"]}'
  if not check['right']:
    return f'WRONG: {check["program"]}: expected {check["expected"]:.9g}, found {check["found"]:.9g}'
  error = f', relative error {check["error"]:.0e}' if 'error' in check else ''
  return f'right: {check["program"]}{error}'
