"""Interprets the pickles of PyTorch's files: tensors, containers, strings and numbers, and nothing else.

`pickle.Unpickler` calls whatever a pickle names. This machine knows the instructions that PyTorch writes, calls only
its own functions, and refuses everything else by name.
"""

import io
import math
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

LARGEST_PICKLE = 2**26
"""Bytes of one pickle, which holds names and shapes but no numbers of a tensor."""
MOST_INSTRUCTIONS = 1_000_000
"""Of one pickle, with the items that its calls read; a large network has fewer than 100,000."""
DEEPEST = 50
"""Levels of nested containers."""
LARGEST_RANK = 32


class Refused(ValueError):
  """What is wrong with a file, in a few words."""


@dataclass(frozen=True)
class Storage:
  """The numbers that tensors view.

  Attributes:
    key: names its bytes in the file.
    dtype: None: bytes, of which each tensor says what they are.
    count: elements of dtype, or bytes.
  """

  key: str
  dtype: np.dtype | None
  count: int

  @property
  def nbytes(self) -> int:
    """Its size in the file."""
    return self.count * (self.dtype.itemsize if self.dtype else 1)


@dataclass(frozen=True)
class Tensor:
  """A view of a storage, inside it; offset and strides are in elements."""

  storage: Storage
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    """Bytes of a contiguous copy, which may exceed the storage's if a stride is 0."""
    return math.prod(self.shape) * self.dtype.itemsize


class Loaded(NamedTuple):
  """A pickle's value, the storages that it mentions, and where it ends in the file."""

  value: Any
  storages: set[Storage]
  end: int


@dataclass(frozen=True)
class _Global:
  name: str  # 'module attribute'.


def dtype_of(name: str) -> np.dtype:
  """The dtype of this name in NumPy, or in ml_dtypes."""
  return np.dtype(getattr(ml_dtypes, name, name))


_DTYPES = {
  f'torch {name}': dtype_of(name)
  for name in (
    'float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz complex128 complex64 '
    'int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool'
  ).split()
}
_STORAGES = {
  **{'Double': 'float64', 'Float': 'float32', 'Half': 'float16', 'BFloat16': 'bfloat16', 'Bool': 'bool'},
  **{'Long': 'int64', 'Int': 'int32', 'Short': 'int16', 'Char': 'int8', 'Byte': 'uint8'},
  **{'ComplexDouble': 'complex128', 'ComplexFloat': 'complex64'},
}
_STORAGE_TYPES = {f'torch {name}Storage': dtype_of(dtype) for name, dtype in _STORAGES.items()} | {
  'torch.storage UntypedStorage': None,
  'torch UntypedStorage': None,
}


def _ordered_dict(items: Any = ()) -> dict:
  pairs = items if isinstance(items, list | tuple) else ()
  if pairs is not items or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
    raise Refused('an OrderedDict is damaged')
  return {_key(key): value for key, value in pairs}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
  if not isinstance(storage, Storage) or storage.dtype is None:
    raise Refused('a tensor has no storage')
  return _tensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_tensor_v2(
  storage: Any, offset: Any, shape: Any, strides: Any, _requires_grad: Any, _hooks: Any, metadata: Any = None
) -> Tensor:
  _check_metadata(metadata)
  return _rebuild_tensor(storage, offset, shape, strides)


def _rebuild_tensor_v3(
  storage: Any,
  offset: Any,
  shape: Any,
  strides: Any,
  _requires_grad: Any,
  _hooks: Any,
  dtype: Any,
  metadata: Any = None,
) -> Tensor:
  _check_metadata(metadata)
  if not isinstance(storage, Storage) or storage.dtype is not None or not isinstance(dtype, _Global):
    raise Refused('a tensor has no storage')
  if dtype.name not in _DTYPES:
    raise Refused(_foreign(dtype.name))
  return _tensor(storage, _DTYPES[dtype.name], offset, shape, strides)


def _rebuild_parameter(tensor: Any, _requires_grad: Any, _hooks: Any) -> Tensor:
  if not isinstance(tensor, Tensor):
    raise Refused('a parameter is no tensor')
  return tensor


_FUNCTIONS: dict[str, Callable[..., Any]] = {
  'collections OrderedDict': _ordered_dict,
  'torch._utils _rebuild_tensor': _rebuild_tensor,
  'torch._utils _rebuild_tensor_v2': _rebuild_tensor_v2,
  'torch._utils _rebuild_tensor_v3': _rebuild_tensor_v3,
  'torch._utils _rebuild_parameter': _rebuild_parameter,
}
_KNOWN = _FUNCTIONS.keys() | _STORAGE_TYPES.keys() | _DTYPES.keys()

_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_LITERALS = frozenset(
  'BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 '
  'BINSTRING SHORT_BINSTRING'.split()
)
_TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


def load_pickle(content: bytes, start: int = 0) -> Loaded:
  """Loads the pickle that begins at `start`.

  Dictionaries are `dict`, tensors `Tensor`. Nothing that the pickle names is imported or called.

  Raises:
    Refused: the pickle is damaged, too large, nested too deeply, or holds something else.
  """
  stream = io.BytesIO(content[start : start + LARGEST_PICKLE])
  try:
    with warnings.catch_warnings(action='ignore'):  # pickletools decodes escapes in names, and warns of unknown ones.
      value, storages = _run(stream)
  except Refused:
    raise
  except (IndexError, KeyError):
    raise Refused('its pickle is damaged') from None
  except ValueError as error:  # From pickletools, such as 'pickle exhausted before seeing STOP'.
    if len(content) - start > LARGEST_PICKLE:
      raise Refused(f'its pickle is longer than {LARGEST_PICKLE:,} bytes') from error
    raise Refused(f'its pickle is damaged or cut short: {error}') from error
  _check_depth(value)
  return Loaded(value, storages, start + stream.tell())


def _run(stream: io.BytesIO) -> tuple[Any, set[Storage]]:
  stack: list[Any] = []
  outer: list[list[Any]] = []  # The stacks below each mark.
  memo: dict[int, Any] = {}
  storages: set[Storage] = set()
  cost = 0
  instructions = pickletools.genops(stream)
  while True:
    opcode, argument, _ = next(instructions)  # Of a pickle that is cut short, it raises ValueError.
    name = opcode.name
    cost += 1
    if cost > MOST_INSTRUCTIONS:
      raise Refused(f'its pickle has more than {MOST_INSTRUCTIONS:,} instructions')
    if name in _LITERALS:
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in ('BINPUT', 'LONG_BINPUT'):
      memo[_expect(argument, int)] = stack[-1]
    elif name == 'MEMOIZE':
      memo[len(memo)] = stack[-1]
    elif name in ('BINGET', 'LONG_BINGET'):
      stack.append(memo[_expect(argument, int)])
    elif name == 'MARK':
      outer.append(stack)
      stack = []
    elif name in _TUPLES:
      items = [stack.pop() for _ in range(_TUPLES[name])]
      stack.append(tuple(reversed(items)))
    elif name == 'TUPLE':
      items, stack = tuple(stack), outer.pop()
      stack.append(items)
    elif name in ('EMPTY_LIST', 'EMPTY_DICT'):
      stack.append([] if name == 'EMPTY_LIST' else {})
    elif name in ('APPEND', 'APPENDS'):
      items, stack = ([stack.pop()], stack) if name == 'APPEND' else (stack, outer.pop())
      _expect(stack[-1], list).extend(items)
    elif name in ('SETITEM', 'SETITEMS'):
      value = stack.pop() if name == 'SETITEM' else None
      items, stack = ([stack.pop(), value], stack) if name == 'SETITEM' else (stack, outer.pop())
      if len(items) % 2:
        raise Refused('its pickle is damaged')
      target = _expect(stack[-1], dict)
      for key, value in zip(items[::2], items[1::2], strict=True):
        target[_key(key)] = value
    elif name == 'GLOBAL':
      stack.append(_global(str(argument)))
    elif name == 'STACK_GLOBAL':
      attribute, module = stack.pop(), stack.pop()
      stack.append(_global(f'{_expect(module, str)} {_expect(attribute, str)}'))
    elif name == 'BINPERSID':
      storage = _storage(stack.pop())
      storages.add(storage)
      stack.append(storage)
    elif name == 'REDUCE':
      arguments, function = _expect(stack.pop(), tuple), stack.pop()
      cost += sum(len(each) for each in arguments if isinstance(each, list | tuple))  # A call may read all of them.
      stack.append(_call(function, arguments))
    elif name == 'BUILD':  # The attributes of an OrderedDict, such as the versions of its modules.
      stack.pop()
      if not isinstance(stack[-1], dict):
        raise Refused('it sets attributes of something else than a dictionary')
    elif name == 'POP':
      stack.pop()
    elif name == 'STOP':
      return stack.pop(), storages
    elif name == 'INST':
      raise Refused(_foreign(str(argument)))
    elif name not in ('PROTO', 'FRAME'):
      raise Refused(f'its pickle has the instruction {name}, which tensors do not need')


def _call(function: Any, arguments: tuple) -> Any:
  if not isinstance(function, _Global) or function.name not in _FUNCTIONS:
    raise Refused('it calls ' + (function.name.replace(' ', '.') if isinstance(function, _Global) else 'an object'))
  try:
    return _FUNCTIONS[function.name](*arguments)
  except TypeError:
    raise Refused(f'it calls {function.name.replace(" ", ".")} with other arguments than PyTorch') from None


def _global(name: str) -> _Global:
  if name not in _KNOWN:
    raise Refused(_foreign(name))
  return _Global(name)


def _foreign(name: str) -> str:
  return f'it names {name.replace(" ", ".")!a:.80}, and only tensors, containers, strings and numbers are read'


def _storage(identity: Any) -> Storage:
  """The storage of a persistent id: ('storage', type, key, device, number of elements)."""
  if not isinstance(identity, tuple) or len(identity) not in (5, 6):
    raise Refused('a storage is damaged')
  kind, dtype, key, _device, count, *view = identity
  if kind != 'storage' or not isinstance(dtype, _Global) or dtype.name not in _STORAGE_TYPES:
    raise Refused('a storage is damaged')
  if any(each is not None for each in view):
    raise Refused('a storage is a view of another, as only very old versions of PyTorch write')
  return Storage(_expect(key, str), _STORAGE_TYPES[dtype.name], _size(count))


def _tensor(storage: Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> Tensor:
  shape = tuple(_size(size) for size in _expect(shape, tuple))
  strides = tuple(_size(stride) for stride in _expect(strides, tuple))
  if len(shape) != len(strides) or len(shape) > LARGEST_RANK:
    raise Refused(f'a tensor has {len(shape)} dimensions and {len(strides)} strides')
  if math.prod(size or 1 for size in shape) >= 2**48:
    raise Refused(f'a tensor of shape {list(shape)} is too large')
  last = _size(offset) + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
  elements = storage.count if storage.dtype else storage.count // dtype.itemsize
  if math.prod(shape) and last >= elements:
    raise Refused(f'a tensor of shape {list(shape)} is larger than its storage of {elements:,} elements')
  return Tensor(storage, dtype, offset, shape, strides)


def _size(value: Any) -> int:
  if type(value) is not int or not 0 <= value < 2**48:
    raise Refused('a tensor has a size, stride or offset that is negative, too large or no number')
  return value


def _check_metadata(metadata: Any) -> None:
  if metadata:  # Such as a pending conjugation.
    raise Refused('a tensor has metadata, which is not read')


def _key(key: Any) -> Any:
  # A tuple may hold itself many times over, and hashing it would take forever.
  if key is not None and not isinstance(key, str | bytes | int | float):
    raise Refused('a dictionary has a key that is no string or number')
  return key


def _expect(value: Any, kind: type) -> Any:
  if not isinstance(value, kind):
    raise Refused('its pickle is damaged')
  return value


def _check_depth(value: Any) -> None:
  level, seen = [[value]], 0
  for _ in range(DEEPEST):
    inner = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    # Each container once, as one may be in others, or in itself, many times over.
    level = list({id(item): item for item in inner if isinstance(item, dict | list | tuple)}.values())
    seen += len(inner)
    if not level:
      return
    if seen > 2 * MOST_INSTRUCTIONS:
      raise Refused('it nests the same containers too many times')
  raise Refused(f'it nests containers more than {DEEPEST} levels deep')
