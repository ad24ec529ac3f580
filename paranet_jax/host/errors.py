"""The exception for what a user can fix, and how a command reports it."""

import contextlib
import errno
import io
import logging as python_logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

_BROKEN_PIPE = 141  # What a shell reports for a command that SIGPIPE ended.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_DEBUGGING = {
  'jax_numpy_rank_promotion': 'allow',
  'jax_numpy_dtype_promotion': 'standard',
  'jax_transfer_guard': None,
  'jax_transfer_guard_host_to_device': None,
  'jax_transfer_guard_device_to_device': None,
  'jax_transfer_guard_device_to_host': None,
  'jax_debug_nans': False,
  'jax_debug_infs': False,
  'jax_debug_key_reuse': False,
  'jax_enable_x64': False,
  'jax_disable_jit': False,
  'jax_check_tracer_leaks': False,
  'jax_no_tracing': False,
  'jax_no_execution': False,
  'jax_enable_checks': False,
  'jax_random_seed_offset': 0,
  'jax_default_prng_impl': 'threefry2x32',
  'jax_threefry_partitionable': True,
}
"""Settings of jax with which a command would fail or compute other numbers, and their defaults."""
_DEVICE_SETTINGS = ('JAX_PLATFORMS', 'JAX_PLATFORM_NAME', 'JAX_NUM_CPU_DEVICES')
_WORDS = {
  True: ('1', 'y', 'yes', 't', 'true', 'on'),
  False: ('0', 'n', 'no', 'f', 'false', 'off'),
  None: ('allow', 'log', 'log_explicit'),  # Of the transfer guards, which have no default of their own.
}
"""What jax reads as these values, or as harmless as the default."""


class UserError(Exception):
  """A user's mistake, in one line: what was expected, what was found, and what fixes it.

  A command prints the line and exits with its code, without a traceback.
  """

  code = 2

  def saying(self, text: str) -> 'UserError':
    """An error with another text and the same exit code."""
    error = UserError(text)
    error.code = self.code
    return error


class LostWorkersError(UserError):
  """What reads the images has ended or hangs, which is no mistake of the user's."""

  code = 1


@contextlib.contextmanager
def report_no_room(workdir: Path) -> Iterator[None]:
  """Turns an error caused by a full disk, a quota or a size limit into a `UserError`."""
  try:
    yield
  except OSError as error:
    if error.errno not in NO_ROOM:
      raise
    raise UserError(
      f'{workdir} cannot be written ({error.strerror}), and its checkpoints are intact; '
      'make room, and the same command resumes'
    ) from error


def without_config_flags(message: str) -> str:
  """A message for a command that has no flag for each field: it names the place of a field instead.

  A flag that another command is to be given, `with` it or with a larger one, stays.
  """
  fix = r'set --config\.([\w.]+(=[^\s,;]+)?)', r'set \1 in the config.json of the run'
  message = re.sub(*fix, message.replace('--config.data.data_dir', '--data_dir'))
  return re.sub(r'\b(and|by|lower|of|or|raise) --config\.', r'\1 ', message)


def exit_code(run: Callable[[], int | None], stopped: str = 'stopped at once', has_config: bool = True) -> int:
  """Runs a command and returns its exit code, 0 if it returns None.

  Returns the code of a `UserError`, whose line it prints; 2 after an error of the file system, whose path it names; 130
  if the command was interrupted, after printing `stopped`; and 141 if the reader of standard output has stopped.

  Args:
    has_config: the command has a flag for each field; otherwise errors name the place of a field instead.
  """
  prepare_output()
  _ignore_debugging()
  try:
    return run() or 0
  except UserError as error:
    _say_error(str(error) if has_config else without_config_flags(str(error)))
    return error.code
  except BrokenPipeError:
    return _BROKEN_PIPE
  except OSError as error:
    if not names_file(error):
      raise
    path = os.fsdecode(error.filename2 or error.filename)
    _say_error(f'{path} cannot be read or written ({error.strerror}); fix that, or name another path')
    return 2
  except (AssertionError, RuntimeError):  # jax raises either, and not always with a text.
    wanted = next((f'{name}={os.environ[name]}' for name in _DEVICE_SETTINGS if os.environ.get(name)), None)
    if not wanted or _platform_starts():
      raise
    _say_error(f'expected the platform of {wanted}, found no such device; unset it')
    return 2
  except ValueError as error:
    if 'jax' in sys.modules or not any(name.startswith('JAX_') for name in os.environ):
      raise
    _say_error(f'expected a value that jax takes, found: {error}; unset that JAX_... variable')  # jax did not import.
    return 2
  except KeyboardInterrupt:
    say(stopped, to_stderr=True)
    return 130


def _ignore_debugging() -> None:
  """Unsets the environment variables of `_DEBUGGING`, also for the processes that this one starts."""
  for name, default in _DEBUGGING.items():
    value = os.environ.get(name.upper(), '')
    same = _WORDS[default] if default is None or isinstance(default, bool) else (str(default),)
    if value.lower() in ('', *same):
      continue
    del os.environ[name.upper()]
    if 'jax' in sys.modules:  # Otherwise jax reads the environment when it is imported.
      sys.modules['jax'].config.update(name, default)
    say(f'{name.upper()}={value} is ignored: commands run with the default settings of jax', to_stderr=True)


def names_file(error: BaseException) -> bool:
  """Whether this is an error of the file system that names a path."""
  return isinstance(error, OSError) and isinstance(error.filename, str | bytes | os.PathLike)


def _say_error(text: str) -> None:
  say(f'error: {" ".join(text.split())}', to_stderr=True)


def say(text: str, to_stderr: bool = False) -> None:
  """Prints lines at once, with what is not printable escaped, such as control characters in a file's name.

  What stderr does not take is lost.

  Raises:
    UserError: standard output cannot be written.
    BrokenPipeError: its reader has stopped.
  """
  try:
    print(printable_lines(text), file=sys.stderr if to_stderr else None, flush=True)  # noqa: T201
  except OSError as error:
    discard_output(2 if to_stderr else sys.stdout.fileno())  # Otherwise Python tries to write it again when it exits.
    if to_stderr:
      return
    if isinstance(error, BrokenPipeError):
      raise
    raise UserError(f'standard output cannot be written ({error.strerror}); make room, or send it elsewhere') from error


def printable_lines(text: str) -> str:
  """Escapes what is not printable, except the ends of lines."""
  return '\n'.join(map(printable, text.split('\n')))


def printable(line: str) -> str:
  """Escapes what is not printable, line ends too. `portable/run.py` has its own: it imports nothing of ours."""
  return ''.join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


class _Formatter(python_logging.Formatter):
  """A line for each record, as printable as what `say` prints."""

  def formatMessage(self, record: python_logging.LogRecord) -> str:
    return printable(super().formatMessage(record))


def prepare_output() -> None:
  """Makes the standard streams of this process usable, and what libraries print on them short and printable."""
  logging.set_verbosity(logging.WARNING)  # At INFO, orbax logs much that users need not see.
  warnings.filterwarnings('ignore', module=r'PIL|paranet_jax\.portable\.run')  # About odd but readable images.
  for descriptor, name in ((1, 'stdout'), (2, 'stderr')):
    if getattr(sys, name) is None:  # Closed, as by `>&-`. Without a descriptor, the next file would get its number.
      try:
        os.fstat(descriptor)
      except OSError:
        discard_output(descriptor)
      setattr(sys, name, open(os.devnull, 'w'))
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # For characters that its encoding lacks.
  if not python_logging.root.handlers:
    python_logging.basicConfig()
    python_logging.root.handlers[0].setFormatter(_Formatter(python_logging.BASIC_FORMAT))


def discard_output(descriptor: int) -> None:
  """Discards what is written to a standard stream from now on, such as after its reader stopped."""
  silent = os.open(os.devnull, os.O_WRONLY)
  if silent != descriptor:
    os.dup2(silent, descriptor)
    os.close(silent)


def _platform_starts() -> bool:
  if 'jax' in sys.modules:
    try:
      sys.modules['jax'].devices()
    except (AssertionError, RuntimeError):
      return False
  return True
