"""Small C++ libraries, compiled on the machine that they run on and kept in PARANET_CACHE_DIR/native."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paranet_jax.host.arguments import cache_folder
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.files import replacing
from paranet_jax.host.machine import cpu_features, machine_key

VARIABLE = 'PARANET_NATIVE'
"""Environment variable, off: no such library is used. It is CXX that names another compiler than g++."""

OPTIONS = ('-O2', '-std=c++17', '-fPIC', '-w', '-march=native')
SECONDS = 120.0


def missing(features: Sequence[str]) -> str | None:
  """Why no library can be used here that needs these instruction sets; None: it can."""
  if os.environ.get(VARIABLE) == 'off':
    return f'{VARIABLE} is off'
  if platform.system() != 'Linux' or platform.machine() != 'x86_64':
    return f'{platform.system()} on {platform.machine()}'
  if absent := [feature for feature in features if feature not in cpu_features()]:
    return f'the processor has no {absent[0]}'
  return None if shutil.which(_compiler()) else f'no compiler {_compiler()}'


def shared_library(
  source: Path, definitions: Mapping[str, object], include: str, parts: tuple[str, int] | None = None
) -> Path | None:
  """The library compiled from a source file with these macros; None: it cannot be compiled or kept.

  Args:
    source: of C++17; it may include the headers beside it.
    definitions: values of macros, by name.
    include: folder of headers.
    parts: macro and number of the parts that the source has, which are compiled at once where there are cores for it.
  """
  options = [*OPTIONS, *(f'-D{name}={value}' for name, value in definitions.items())]
  described = '\n'.join([machine_key(), _compiler(), *options, *(path.read_text() for path in sources(source))])
  try:
    folder = cache_folder() / 'native'
    file = folder / f'{source.stem}-{hashlib.sha256(described.encode()).hexdigest()[:16]}.so'
    if file.exists():
      return file
    folder.mkdir(parents=True, exist_ok=True)
  except (UserError, OSError):
    return None  # No place that lasts; compiling at every start would cost more than it gains.
  try:
    with tempfile.TemporaryDirectory() as holder:
      compiled = Path(holder) / file.name
      command = [_compiler(), *options, f'-I{include}', str(source)]
      if parts and len(os.sched_getaffinity(0)) > 1:
        macro, count = parts
        objects = [Path(holder) / f'{number}.o' for number in range(count)]
        with ThreadPoolExecutor(count) as pool:
          commands = [[*command, '-c', f'-D{macro}={number}', '-o', str(to)] for number, to in enumerate(objects)]
          list(pool.map(_run, commands))
        command = [_compiler(), *map(str, objects)]
      _run([*command, '-shared', '-o', str(compiled)])
      content = compiled.read_bytes()
    with replacing(file, 'wb') as kept:  # Another process may have been faster: the same library.
      kept.write(content)
  except (OSError, subprocess.SubprocessError) as error:
    output = getattr(error, 'stderr', None) or str(error).encode()
    lines = output.decode(errors='replace').strip().splitlines() or ['']
    first = next((line for line in lines if 'error' in line), lines[-1])
    say(f'warning: {source.name} could not be compiled ({first.strip()}): slower without; {VARIABLE}=off hides this')
    return None
  return file


def opened(file: Path) -> ctypes.CDLL | None:
  """A library of `shared_library`, loaded; None: the system refuses it, which a line says.

  As where its file is damaged, its folder's file system allows no programs, or a machine that shares the folder has
  compiled it with a newer C library.
  """
  try:
    return ctypes.CDLL(str(file))
  except OSError as error:
    say(
      # The error may name a library of the system, which is older than what the file needs.
      f'warning: the kernels cannot be loaded ({error}): slower without; remove {file}, or set PARANET_CACHE_DIR to '
      f'another folder; {VARIABLE}=off hides this'
    )
    return None


def sources(source: Path) -> list[Path]:
  """What a library is compiled from: the source file and the headers beside it."""
  return [source, *sorted(source.parent.glob('*.h'))]


def _run(command: Sequence[str]) -> None:
  # In a session of its own: the compiler is a driver, and what it starts would outlive it.
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
    try:
      output, errors = process.communicate(timeout=SECONDS)
    except BaseException:  # Also Control-C, which does not reach that session.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      raise
  if process.returncode:
    raise subprocess.CalledProcessError(process.returncode, command, output, errors)


def _compiler() -> str:
  return os.environ.get('CXX') or 'g++'
