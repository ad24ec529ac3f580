"""Reads the tensors of a PyTorch file: `.safetensors`, or what `torch.save` writes (`.pth`, `.pt`, `.th`).

`torch.save` writes a zip archive, and before version 1.6 wrote five pickles followed by the storages' bytes. The
format is recognized by content. Nothing in the file is executed (see `tensor_pickle.py`).
"""

import io
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_file
from paranet_jax.weights.tensor_pickle import Refused, Storage, Tensor, dtype_of, load_pickle

LARGEST_FILE = 2**31
"""Bytes of a file, and of the tensors read from it, which may repeat bytes of the file."""

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_CONTAINERS = ('state_dict', 'model_state_dict', 'model', 'net')
"""Where training programs keep the state dict in a checkpoint, in order of preference."""
_SAFETENSORS = {
  **{f'{kind}{bits}': f'{name}{bits}' for kind, name in (('I', 'int'), ('U', 'uint')) for bits in (8, 16, 32, 64)},
  **{f'F{bits}': f'float{bits}' for bits in (16, 32, 64)},
  **{'BF16': 'bfloat16', 'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2', 'BOOL': 'bool', 'C64': 'complex64'},
}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
  """Reads a state dict: every tensor by its name.

  A checkpoint may hold the state dict under `state_dict`, `model_state_dict`, `model` or `net`; its other contents are
  ignored. bfloat16 and float8 are the types of ml_dtypes.

  Raises:
    UserError: the file cannot be read, is larger than `LARGEST_FILE`, is damaged, or holds anything else than tensors,
      containers, strings and numbers.
  """
  fix = 'save the state dict alone, by torch.save(model.state_dict(), FILE) or as safetensors, and name that file'
  try:
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
      raise Refused(f'it has more than {LARGEST_FILE:,} bytes')
    content = read_file(path, 'name a file of PyTorch weights')
    if content is None:
      raise UserError(f'{path} does not exist; name a file of PyTorch weights')
    if content[8:9] == b'{':
      return _read_safetensors(content)
    if content[:2] == b'PK':
      return _read_zip(content)
    return _read_legacy(content)
  except Refused as error:
    raise UserError(f'{path} cannot be read as PyTorch weights ({error}); {fix}') from error


def _read_safetensors(content: bytes) -> dict[str, np.ndarray]:
  try:
    import safetensors
  except ImportError as error:
    raise UserError('reading .safetensors needs safetensors, found none; pip install safetensors') from error
  try:
    entries = safetensors.deserialize(content)
  except safetensors.SafetensorError as error:
    raise Refused(str(error)) from error
  tensors = {}
  for name, entry in sorted(entries, key=lambda item: item[0]):  # They come in any order.
    if entry['dtype'] not in _SAFETENSORS:
      raise Refused(f'{name!a:.80} has the type {entry["dtype"]}, which NumPy cannot hold')
    dtype = dtype_of(_SAFETENSORS[entry['dtype']])
    tensors[name] = np.ndarray(entry['shape'], _stored(dtype), entry['data']).astype(dtype)
  return tensors


def _read_zip(content: bytes) -> dict[str, np.ndarray]:
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      entries = _entries(archive, len(content))
      pickles = [name for name in entries if name.endswith('/data.pkl')]
      if len(pickles) != 1:
        raise Refused(f'expected one data.pkl in the archive, found {len(pickles)}')
      folder = pickles[0].removesuffix('data.pkl')
      # Versions before 2.1 do not write it.
      order = archive.read(entries[f'{folder}byteorder']).decode() if f'{folder}byteorder' in entries else 'little'
      if order not in ('little', 'big'):
        raise Refused(f'its byte order is {order!a:.20}')
      value = load_pickle(archive.read(entries[pickles[0]])).value

      def read(storage: Storage) -> bytes:
        name = f'{folder}data/{storage.key}'
        if name not in entries:
          raise Refused(f'it lacks the storage {name!a:.80}')
        return archive.read(entries[name])

      return _materialize(value, read, swap=order != sys.byteorder)
  except Refused:
    raise
  # What zipfile raises for damaged archives.
  except (
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    struct.error,
  ) as error:
    raise Refused(f'its archive is damaged or cut short: {error}') from error


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
  """The entries by name. PyTorch compresses none, so together they are smaller than the archive."""
  entries = {}
  for entry in archive.infolist():
    if entry.filename in entries:
      raise Refused(f'its archive has two entries {entry.filename!a:.80}')
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
      raise Refused(f'its archive compresses {entry.filename!a:.80}, which PyTorch does not')
    entries[entry.filename] = entry
  if sum(entry.file_size for entry in entries.values()) > size:
    raise Refused('its archive has entries that overlap')
  return entries


def _read_legacy(content: bytes) -> dict[str, np.ndarray]:
  if not content.startswith(b'\x80'):
    raise Refused('expected a file that torch.save wrote, or safetensors')
  magic = load_pickle(content)
  if magic.value != _MAGIC:
    raise Refused('it is a pickle, but not one that torch.save wrote')
  version = load_pickle(content, magic.end)
  system = load_pickle(content, version.end)
  saved = load_pickle(content, system.end)
  keys = load_pickle(content, saved.end)
  if version.value != _LEGACY_VERSION or not isinstance(system.value, dict) or not isinstance(keys.value, list):
    raise Refused('its header is damaged')
  if system.value.get('little_endian', True) is not True:
    raise Refused('it was written on a big-endian machine, by a version of PyTorch before 1.6')
  storages = {storage.key: storage for storage in saved.storages}
  if len(storages) < len(saved.storages):
    raise Refused('its tensors disagree about the size or type of a storage')
  places, start = {}, keys.end
  for key in keys.value:
    storage = storages.get(key) if isinstance(key, str) else None
    if storage is None:
      raise Refused(f'it has a storage {key!a:.80} that no tensor uses')
    if start + 8 + storage.nbytes > len(content):
      raise Refused(f'it is cut short: storage {key!a:.80} should have {storage.nbytes:,} bytes')
    if int.from_bytes(content[start : start + 8], 'little') != storage.count:
      raise Refused(f'storage {key!a:.80} does not have {storage.count:,} elements')
    places[storage] = start + 8
    start += 8 + storage.nbytes

  def read(storage: Storage) -> bytes:
    if storage not in places:
      raise Refused(f'it lacks the storage {storage.key!a:.80}')
    return content[places[storage] : places[storage] + storage.nbytes]

  return _materialize(saved.value, read)


def _materialize(value: Any, read: Callable[[Storage], bytes], swap: bool = False) -> dict[str, np.ndarray]:
  """The state dict in a pickle's value as arrays.

  Args:
    read: returns the bytes of a storage.
    swap: the bytes are in the order of the other kind of machine.
  """
  found = _state_dict(value)
  if (total := sum(tensor.nbytes for tensor in found.values())) > LARGEST_FILE:
    raise Refused(f'its tensors have {total:,} bytes, more than {LARGEST_FILE:,}')
  buffers: dict[str, bytes] = {}
  arrays = {}
  for name, tensor in found.items():
    key = tensor.storage.key
    if key not in buffers:
      buffers[key] = read(tensor.storage)
    arrays[name] = _array(tensor, buffers[key], swap)
  return arrays


def _state_dict(value: Any) -> dict[str, Tensor]:
  if not isinstance(value, dict):
    raise Refused('it holds something else than a state dict')
  # A checkpoint may have other tensors beside its state dict, such as its best accuracy.
  for found in (*(value[name] for name in _CONTAINERS if isinstance(value.get(name), dict)), value):
    tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    if tensors:
      if not all(isinstance(name, str) for name in tensors):
        raise Refused('it has tensors whose names are no strings')
      return tensors
  raise Refused('it has no state dict: no tensors by name, and none under ' + ', '.join(_CONTAINERS))


def _array(tensor: Tensor, buffer: bytes, swap: bool) -> np.ndarray:
  if len(buffer) != tensor.storage.nbytes:
    raise Refused(f'storage {tensor.storage.key!a:.80} has {len(buffer):,} bytes instead of {tensor.storage.nbytes:,}')
  if not math.prod(tensor.shape):
    return np.zeros(tensor.shape, tensor.dtype)
  dtype = _stored(tensor.dtype)
  strides = [stride * dtype.itemsize for stride in tensor.strides]
  view = np.ndarray(tensor.shape, dtype, buffer, tensor.offset * dtype.itemsize, strides)
  return (view.byteswap() if swap else view.copy()).astype(tensor.dtype, copy=False)


def _stored(dtype: np.dtype) -> np.dtype:
  """The type that a file's bytes are read as: of a bool, any byte but 0 is true."""
  return np.dtype(np.uint8) if dtype == np.bool_ else dtype
