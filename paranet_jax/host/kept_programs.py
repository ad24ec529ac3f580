"""Compiled programs that are kept whole, so that a start which finds them traces nothing.

jax's own cache keeps what XLA has compiled, but is asked with the traced and lowered program, which takes most of a
warm start. A program kept here is found by what determines it: the source of this package, the versions of the
libraries, the machine, jax's settings, the shapes of the arguments, and what the caller says. On a CPU only, in
commands and where `machine.keep_programs` turned jax's cache on; everywhere else that cache serves.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pickle
import platform
import stat
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable

from paranet_jax.host.files import replacing
from paranet_jax.host.known_faults import VARIABLE
from paranet_jax.host.machine import keeps_whole, machine_key, usable_cores
from paranet_jax.host.starting import BEGAN

T = TypeVar('T')

FOLDER = 'programs'
_PACKAGE = Path(__file__).parents[1]
MOST = 64
"""Files that are kept; the oldest make room."""

_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'ml_dtypes')
_OURS = 'paranet_jax'
_KNOWN = frozenset({_OURS, 'jax', 'flax', *sys.stdlib_module_names} - {'__main__'})
"""Packages whose code the versions and the source of this one tell."""
_NO_MATTER = ('cache', 'log', 'traceback', 'source_url')
"""Parts of the names of jax's settings that change no program."""

_asked: dict[tuple[Callable, tuple], Any] = {}
"""Answers by function and arguments, of the whole process: what is traced once may be a part of several programs."""


_guesses: contextvars.ContextVar[dict[tuple[Callable, tuple], Any] | None] = contextvars.ContextVar(
  'guesses', default=None
)
"""What a trace takes for granted, in a thread that is going to check it."""


class UnknownError(Exception):
  """What determines a program is not known, such as a module from outside this package."""


def keeps() -> Path | None:
  """The folder of kept programs, in that of jax's cache; None: none are kept here."""
  if not keeps_whole():
    return None
  settings: Any = jax.config  # jax defines their names when it runs.
  folder = settings.jax_compilation_cache_dir if settings.jax_enable_compilation_cache else None
  elsewhere = settings.jax_default_device is not None or jax.process_count() > 1 or jax.default_backend() != 'cpu'
  return Path(folder) / FOLDER if folder and not elsewhere else None


def asked(function: Callable[..., T], *args: Any, guess: T | None = None) -> T:
  """Calls a function of a module whose answer decides what is traced; it is asked again before a kept program is used.

  Args:
    args: the answer and they can be pickled.
    guess: the answer in all likelihood: a `Kept` program is traced with it while another thread works on the answer,
      and is traced again if that is another one.
  """
  guesses = _guesses.get()
  if guess is not None and guesses is not None and (function, args) not in _asked:
    guesses[function, args] = guess
    return guess
  _asked[function, args] = answer = function(*args)
  return answer


class Kept:
  """A jitted function for one set of argument shapes, read from where it is kept, or compiled and kept.

  Safe to share between threads. Where it cannot be kept, it is the jitted function.
  """

  def __init__(self, name: str, function: Callable[[], jax.stages.Wrapped], determines: Callable[[], Any]):
    """
    Args:
      name: part of the file's name.
      function: makes the jitted function, when there is no kept program.
      determines: gives all that the program depends on beside its arguments, see `described`.
    """
    self._name, self._make, self._determines = name, function, determines
    self._lock = threading.Lock()
    self._program: Callable | None = None
    self._jitted: Callable | None = None

  def __call__(self, *args: Any) -> Any:
    if self._program is None:
      self.prepare(*args)
    program: Any = self._program
    try:
      return program(*args)
    except (TypeError, ValueError):  # Of arguments of another kind than the first, before anything is computed.
      if program is self._jitted:
        raise
      return self._function()(*args)

  def prepare(self, *args: Any) -> None:
    """Reads or compiles the program for arguments like these."""
    with self._lock:
      self._program = self._program or self._found(args)

  def _function(self) -> Any:
    self._jitted = self._jitted or self._make()
    return self._jitted

  def _found(self, args: tuple) -> Callable:
    file = _file(self._name, self._determines, args)
    if not file:
      return self._function()
    return _read(file, _devices(args)) or _compiled(file, self._function(), args)


def remembered(name: str, compute: Callable[[], T], determines: Any) -> T:
  """A value that only this package's source and `determines` decide, from where it is kept, or computed and kept.

  Args:
    compute: gives a value that can be pickled.
  """
  file = _file(name, lambda: determines, ())
  if not file:
    return compute()
  content = _content(file)
  with contextlib.suppress(Exception):
    if content is not None:
      return pickle.loads(content)
  value = compute()
  _write(file, pickle.dumps(value))
  return value


def _compiled(file: Path, function: Any, args: tuple) -> Callable:
  token = _guesses.set(guesses := {})
  try:
    lowered = function.lower(*args)
  finally:
    _guesses.reset(token)
  if any(asked(question, *of) != guess for (question, of), guess in guesses.items()):
    function.clear_cache()
    lowered = function.lower(*args)
  hits = _hits()
  compiled = lowered.compile()
  if _hits() == hits:  # XLA cannot write a program that it has read from jax's cache: functions are missing then.
    threading.Thread(target=_keep, args=(file, compiled), name='keeps a program').start()
  return compiled


class _Counter(threading.local):
  """Programs that this thread has read from jax's cache."""

  hits = 0

  def note(self, event: str, **_: Any) -> None:
    self.hits += event == '/jax/compilation_cache/cache_hits'


@functools.cache
def _counter() -> _Counter:
  counter = _Counter()
  jax.monitoring.register_event_listener(counter.note)
  return counter


def _hits() -> int:
  return _counter().hits


def _keep(file: Path, compiled: jax.stages.Compiled) -> None:
  with contextlib.suppress(Exception):  # Such as one that this jaxlib cannot serialize: it is compiled at every start.
    _write(file, pickle.dumps((dict(_asked), serialize_executable.serialize(compiled))))


def _read(file: Path, devices: list[Any]) -> Callable | None:
  content = _content(file)
  if content is None:
    return None
  with contextlib.suppress(Exception):  # Whatever is wrong with it, it is compiled again.
    noted, program = pickle.loads(content)
    if all(asked(function, *args) == answer for (function, args), answer in noted.items()):
      return serialize_executable.deserialize_and_load(*program, execution_devices=devices)
  return None


def _devices(args: tuple) -> list[Any]:
  """Where arguments lie, or else would be put."""
  arrays = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)]
  return list({device for array in arrays for device in array.devices()}) or jax.devices()[:1]


def _content(file: Path) -> bytes | None:
  """What was written, None if there is none or it is damaged: machine code that differs in one bit may do anything."""
  with contextlib.suppress(OSError):
    with file.open('rb') as kept:
      status = os.fstat(kept.fileno())
      # What is read may do anything in our name: no other user may have written it.
      if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
      whole = kept.read()
    found, content = whole[:32], whole[32:]
    if _seal(file, content) == found:
      with contextlib.suppress(OSError):  # A folder that is only read.
        os.utime(file)
      return content
  return None


def _seal(file: Path, content: bytes) -> bytes:
  """Of a file's name too: what lies under another one is another program."""
  return hashlib.sha256(file.name.encode() + b'\n' + content).digest()


def _write(file: Path, content: bytes) -> None:
  with contextlib.suppress(OSError):  # A full disk: the next start computes it again.
    if _edited():
      return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, 'wb') as kept:
      os.fchmod(kept.fileno(), stat.S_IMODE(os.fstat(kept.fileno()).st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
      kept.write(_seal(file, content) + content)
    files = sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in files[:-MOST]:
      old.unlink(missing_ok=True)


def _file(name: str, determines: Callable[[], Any], args: tuple) -> Path | None:
  folder = keeps()
  with contextlib.suppress(UnknownError, OSError):
    return folder and folder / f'{name}-{_key(name, determines(), args)}'
  return None


def _key(name: str, determines: Any, args: tuple) -> str:
  leaves, structure = jax.tree.flatten(args)
  if args and len(_devices(args)) > 1:
    raise UnknownError('several devices')
  shapes = [
    (np.shape(leaf), str(leaf.dtype), getattr(leaf, 'weak_type', False), repr(getattr(leaf, 'sharding', None)))
    for leaf in leaves
  ]
  if _edited():
    raise UnknownError('source that is not what runs')
  everything = name, described(determines), _source(), _surroundings(), str(structure), shapes
  return hashlib.sha256(repr(everything).encode()).hexdigest()[:32]


def _files() -> list[Path]:
  return sorted(path for suffix in ('py', 'cc', 'h') for path in _PACKAGE.rglob(f'*.{suffix}'))


def _edited() -> bool:
  """Whether a file of this package has changed since this process began: it may run what is no longer there."""
  return any(path.stat().st_ctime > BEGAN for path in _files())


@functools.cache
def _source() -> str:
  """A digest of this package, with what it traces through."""
  digest = hashlib.sha256()
  for path in _files():
    digest.update(f'{path.relative_to(_PACKAGE)}\n'.encode() + path.read_bytes())
  versions = [importlib.metadata.version(name) for name in _LIBRARIES]
  digest.update(repr((platform.python_version(), versions)).encode())
  return digest.hexdigest()


def _surroundings() -> tuple:
  settings: dict[str, Any] = jax.config.values
  # As an attribute, a setting has the value of a context that this thread is in; some are no attributes.
  now = {name: getattr(jax.config, name, value) for name, value in settings.items()}
  matter = {name: repr(value) for name, value in now.items() if not any(part in name for part in _NO_MATTER)}
  own = {name: value for name, value in os.environ.items() if name.startswith('PARANET_') and not name.endswith('_DIR')}
  machine = machine_key(), usable_cores(), len(jax.devices())
  return *machine, os.environ.get(VARIABLE), sorted(own.items()), sorted(matter.items())


def described(value: Any) -> Any:
  """What tells a value from every other one, made of strings and tuples.

  A value of a class of this package whose code a name decides, as of a registered one, tells as `code_of_others` where
  that code is, 'module:name'.

  Raises:
    UnknownError: it depends on code from outside this package.
  """
  kind: Any = type(value)
  if value is None or kind in (bool, int, float, str, bytes):
    return repr(value)
  if isinstance(value, np.dtype) or (isinstance(value, type) and _is_scalar(value)):
    return f'dtype {np.dtype(value)}'
  if isinstance(value, tuple | list) and kind in (tuple, list):
    return (kind.__name__, *map(described, value))
  if isinstance(value, Mapping):
    pairs = sorted((repr(key), described(each)) for key, each in value.items())
    return ('mapping', *pairs)
  if isinstance(value, np.ndarray | np.generic):
    return 'array', value.shape, str(value.dtype), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
  if isinstance(value, functools.partial):
    return 'partial', described(value.func), described(value.args), described(value.keywords)
  name = f'{kind.__module__}.{kind.__qualname__}'
  if _package(kind.__module__) == _OURS and '<locals>' not in name:
    if isinstance(value, tuple):  # A NamedTuple.
      return (name, *map(described, value))
    if dataclasses.is_dataclass(value):
      fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
      others = getattr(value, 'code_of_others', f'{_OURS}:')
      if _package(others) != _OURS:
        raise UnknownError(others)
      return name, others, _bases(kind), described({field: each for field, each in fields.items() if field != 'parent'})
  module, qualified = getattr(value, '__module__', ''), getattr(value, '__qualname__', '<')
  bound = getattr(value, '__self__', None) is not None
  if callable(value) and _package(str(module)) in (_OURS, 'jax', 'flax') and '<' not in qualified and not bound:
    return 'function', module, qualified, _bases(value) if isinstance(value, type) else ()
  raise UnknownError(f'{value!r:.80}')


def _bases(kind: type) -> tuple[str, ...]:
  """A class and those that it is derived from, which may be made by a function of this package from any other one."""
  if others := [base for base in kind.__mro__ if _package(base.__module__) not in _KNOWN]:
    raise UnknownError(f'{others[0]!r:.80}')
  return tuple(f'{base.__module__}.{base.__qualname__}' for base in kind.__mro__)


def _is_scalar(kind: type) -> bool:
  """Whether a class is a dtype's, such as np.float32 or jnp.float32, and not one with such an attribute."""
  return issubclass(kind, np.generic) or isinstance(kind, type(jnp.float32))


def _package(module: str) -> str:
  return module.partition(':')[0].partition('.')[0]


def digest(value: Any) -> str:
  """A digest of what `described` gives."""
  return hashlib.sha256(repr(described(value)).encode()).hexdigest()
