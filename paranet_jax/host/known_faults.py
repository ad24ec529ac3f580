"""Versions of jaxlib that compute wrong numbers or crash, and the XLA flags that avoid it. Imports no jax."""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

VARIABLE = 'XLA_FLAGS'
ACCEPT = 'PARANET_ACCEPT_WRONG_NUMBERS'
"""Environment variable, 1: the checks of `models/numerics.py` warn of wrong numbers instead of refusing to compute."""


class Fault(NamedTuple):
  """What a jaxlib does wrong on CPUs from `first` on; `fixed` is right again. Versions are (major, minor, patch)."""

  what: str
  first: tuple[int, ...]
  fixed: tuple[int, ...]
  flag: str
  issue: str


_NO_SUMS = '--xla_cpu_experimental_ynn_fusion_type=-reduce'
"""Keeps sums out of YNNPACK, and its fast bfloat16 products in."""

# Ranges were tried with jaxlib 0.10.2, 0.11.0, 0.11.1, 0.11.2 and 0.12.0 on an Intel Xeon, by the programs of
# `numerics.summed_products` and `doctor/crashes.py`.
KNOWN_FAULTS = (
  Fault(
    'vmapped matrix-vector products that are summed are wrong above 32,768 rows',
    (0, 10, 2),
    (0, 11, 0),
    _NO_SUMS,
    'https://github.com/jax-ml/jax/issues/39103',
  ),
  Fault(
    'the sum of a product of arrays of 7 axes crashes',
    (0, 10, 2),
    (0, 11, 0),
    _NO_SUMS,
    'https://github.com/jax-ml/jax/issues/40412',
  ),
  Fault(
    'the sum of a product of arrays of 8 axes crashes',
    (0, 10, 2),
    (0, 11, 1),
    _NO_SUMS,
    'https://github.com/jax-ml/jax/issues/39257',
  ),
)


def avoid_known_faults() -> None:
  """Adds to XLA_FLAGS what the installed jaxlib needs, except flags that the user has set.

  Call it before jax computes anything: XLA reads the variable once. XLA aborts on a flag that it does not know, so a
  version that is not in the table gets none.
  """
  version = jaxlib_version()
  given = os.environ.get(VARIABLE, '')
  added = {fault.flag for fault in faults_of(version) if fault.flag.partition('=')[0] not in given}
  if added:
    os.environ[VARIABLE] = ' '.join(filter(None, [given, *sorted(added)]))


def accept_wrong_numbers(accept: bool) -> None:
  """Makes this process, and those that it starts, compute on although a check fails (`--accept_wrong_numbers`)."""
  if accept:
    os.environ[ACCEPT] = '1'


def wrong_numbers_accepted() -> bool:
  return os.environ.get(ACCEPT) == '1'


def faults_of(version: tuple[int, ...] | None) -> list[Fault]:
  """The known faults of a jaxlib."""
  return [fault for fault in KNOWN_FAULTS if version and fault.first <= version < fault.fixed]


def jaxlib_version() -> tuple[int, ...] | None:
  """Version of the jaxlib that would be imported; None: there is none, or it does not tell."""
  for folder in map(Path, sys.path):
    if os.path.isdir(folder / 'jaxlib'):  # Unlike Path.is_dir, also False where the folder may not be entered.
      # importlib.metadata takes 25 ms to import, a tenth of a command's --help.
      names = [path.name for path in folder.glob('jaxlib-*.dist-info')]
      numbers = re.findall(r'\d+', names[0].removeprefix('jaxlib-')) if names else ()
      return tuple(map(int, numbers[:3])) or None
  return None
