"""PyTorch's files are read without executing anything: files that PyTorch wrote, hostile ones and damaged ones."""

import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tensor_files import safetensors_bytes

from paranet_jax.host.errors import UserError
from paranet_jax.weights import pytorch_file, tensor_pickle
from paranet_jax.weights.pytorch_file import read_tensors

FOLDER = Path(__file__).resolve().parents[1] / 'fixtures' / 'pytorch'
"""Written by tests/slow/pytorch_fixtures.py."""
NUMBERS = (
  *('float64', 'float16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'uint16', 'uint32', 'uint64'),
  *('complex64', 'complex128', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2'),
)
FIX = 'save the state dict alone, by torch.save(model.state_dict(), FILE) or as safetensors, and name that file'


def refusal(path):
  with pytest.raises(UserError) as error:
    read_tensors(path)
  message = str(error.value)
  assert '\n' not in message
  return message


def reason(path):
  message = refusal(path)
  start, end = f'{path} cannot be read as PyTorch weights (', f'); {FIX}'
  assert message.startswith(start) and message.endswith(end), message
  return message[len(start) : -len(end)]


# Opcodes of a pickle.
def text(value):
  return b'X' + struct.pack('<I', len(value)) + value.encode()


def number(value):
  return b'J' + struct.pack('<i', value) if -(2**31) <= value < 2**31 else b'\x8a\x08' + struct.pack('<q', value)


def several(*items):
  return b'(' + b''.join(items) + b't'


def calls(name, *arguments):
  return b'c' + '\n'.join(name.rsplit('.', 1)).encode() + b'\n' + several(*arguments) + b'R'


def storage(count=6, key='0', kind='Float', device='cpu'):
  identity = several(text('storage'), f'ctorch\n{kind}Storage\n'.encode(), text(key), text(device), number(count))
  return identity + b'Q'


def tensor(shape=(2, 3), strides=(3, 1), offset=0, of=None, name='_rebuild_tensor_v2'):
  module = b'ctorch._utils\n' + name.encode() + b'\n'
  arguments = [of or storage(), number(offset), several(*map(number, shape)), several(*map(number, strides))]
  return module + several(*arguments, b'\x89', b'ccollections\nOrderedDict\n)R') + b'R'


def named(value, name='weight'):
  return b'}' + text(name) + value + b's'


SIX = [('data/0', np.arange(6, dtype='<f4').tobytes())]


def archive(path, body, entries=SIX, compress=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, 'w', compress) as file:
    for name, content in (('data.pkl', b'\x80\x02' + body + b'.'), *entries):
      file.writestr(f'archive/{name}', content)
  return path


@pytest.mark.parametrize('name', ['zip.pth', 'legacy.pth'])
def test_a_checkpoint_of_pytorch(name):
  found = read_tensors(FOLDER / name)
  base = np.arange(24, dtype=np.float32).reshape(4, 6)
  expected = {
    '0.weight': np.float32([[0, 1, 2], [3, 4, 5]]),
    '0.bias': np.float32([-1.5, 2]),
    '1.weight': np.float32([1, 1]),
    '1.bias': np.float32([0, 0]),
    '1.running_mean': np.float32([0, 0]),
    '1.running_var': np.float32([1, 1]),
    '1.num_batches_tracked': np.int64(0),
    'transposed': base.T,
    'part': base[1:3, 2:5:2],
    'expanded': np.full((3, 2), np.float32(7)),
    'empty': np.zeros((0, 3), np.float32),
    'scalar': np.int64(5),
    **{name: np.arange(4).astype(getattr(ml_dtypes, name, name)) for name in NUMBERS},
    'bool': np.array([True, False, True]),
  }
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(found[key], value, strict=True, err_msg=key)


def test_safetensors(tmp_path):
  types = {name: np.arange(4).astype(getattr(ml_dtypes, name, name)) for name in NUMBERS if name != 'complex128'}
  types |= {'bool': np.array([True, False]), 'empty': np.zeros((0, 3), np.float32), 'scalar': np.array(5)}
  (tmp_path / 'a.safetensors').write_bytes(safetensors_bytes(types))
  found = read_tensors(tmp_path / 'a.safetensors')
  assert found.keys() == types.keys()
  for name, value in types.items():
    np.testing.assert_array_equal(found[name], value, strict=True, err_msg=name)


def test_a_type_of_safetensors_that_numpy_lacks(tmp_path):
  header = json.dumps({'scales': {'dtype': 'F8_E8M0', 'shape': [8], 'data_offsets': [0, 8]}}).encode()
  (tmp_path / 'a').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(8))
  assert reason(tmp_path / 'a') == "'scales' has the type F8_E8M0, which NumPy cannot hold"


def test_safetensors_is_not_installed(tmp_path, monkeypatch):
  (tmp_path / 'a').write_bytes(safetensors_bytes({}))
  monkeypatch.setitem(sys.modules, 'safetensors', None)
  assert refusal(tmp_path / 'a') == 'reading .safetensors needs safetensors, found none; pip install safetensors'


@pytest.mark.parametrize('container', ['', 'state_dict', 'model_state_dict', 'model', 'net'])
def test_where_the_state_dict_is(tmp_path, container):
  body = named(tensor())
  found = read_tensors(archive(tmp_path / 'a', named(body, container) if container else body))
  np.testing.assert_array_equal(found['weight'], np.float32([[0, 1, 2], [3, 4, 5]]), strict=True)


@pytest.mark.parametrize('container', ['state_dict', 'model_state_dict', 'model', 'net'])
def test_tensors_beside_the_state_dict_are_ignored(tmp_path, container):
  """As the best accuracy that PyTorch's ImageNet example saves."""
  best, inner = text('best_acc1') + tensor((), ()) + b's', text(container) + named(tensor()) + b's'
  for body in (b'}' + best + inner, b'}' + inner + best):
    found = read_tensors(archive(tmp_path / 'a', body))
    assert list(found) == ['weight'] and found['weight'].shape == (2, 3)


def test_a_container_without_tensors_is_no_state_dict(tmp_path):
  body = named(tensor()) + text('model') + named(number(1)) + b's'
  assert list(read_tensors(archive(tmp_path / 'a', body))) == ['weight']


@pytest.mark.parametrize('kind', ['Float', 'BFloat16', 'ComplexFloat'])
def test_the_other_byte_order(tmp_path, kind):
  dtype = {'Float': '>f4', 'ComplexFloat': '>c8', 'BFloat16': ml_dtypes.bfloat16}[kind]
  content = np.arange(6).astype(dtype)
  content = content.byteswap() if kind == 'BFloat16' else content
  entries = [('data/0', content.tobytes()), ('byteorder', 'big')]
  found = read_tensors(archive(tmp_path / 'a', named(tensor(of=storage(kind=kind))), entries))['weight']
  np.testing.assert_array_equal(found.astype(np.complex64), np.arange(6).reshape(2, 3).astype(np.complex64))


RUNS = b'cos\nsystem\n' + several(text('touch ran')) + b'R'
V3 = b'K\0', b')', b')', b'\x89', b'}'  # Offset, shape, strides, no gradient and no hooks.
HOSTILE = {
  'a call': (RUNS, "it names 'os.system', and only tensors, containers, strings and numbers are read"),
  'a call by the stack': (
    b'\x80\x04' + text('builtins') + text('eval') + b'\x93' + several(text('1')) + b'R',
    'it names',
  ),
  'an instance': (b'(' + text('touch ran') + b'ios\nsystem\n', "it names 'os.system'"),
  'an object': (b'(ccollections\nOrderedDict\no', 'its pickle has the instruction OBJ, which tensors do not need'),
  'a new object': (b'ccollections\nOrderedDict\n)\x81', 'its pickle has the instruction NEWOBJ'),
  'an extension': (b'\x82\x01', 'its pickle has the instruction EXT1'),
  'a text id': (b'Pa\n', 'its pickle has the instruction PERSID'),
  'a nested pickle': (calls('torch.storage._load_from_bytes', text('')), "it names 'torch.storage._load_from_bytes'"),
  'an attribute of a module': (b'ctorch._utils\n_rebuild_tensor.__globals__\n', "it names 'torch._utils._rebuild"),
  'a storage that is called': (b'ctorch\nFloatStorage\n)R', 'it calls torch.FloatStorage'),
  'a string that is called': (text('a') + b')R', 'it calls an object'),
  'attributes of a function': (
    b'ctorch._utils\n_rebuild_tensor\n' + b'}b',
    'it sets attributes of something else than a dictionary',
  ),
  'other arguments': (
    calls('torch._utils._rebuild_tensor', text('')),
    'it calls torch._utils._rebuild_tensor with other',
  ),
  'pairs that are none': (calls('collections.OrderedDict', text('abc')), 'an OrderedDict is damaged'),
  'a parameter of nothing': (
    calls('torch._utils._rebuild_parameter', text('a'), b'\x88', b'}'),
    'a parameter is no tensor',
  ),
  'a tensor of nothing': (tensor(of=text('a')), 'a tensor has no storage'),
  'a tensor of bytes with a type': (
    calls('torch._utils._rebuild_tensor_v3', storage(), *V3, b'ctorch\nint8\n'),
    'a tensor has no storage',
  ),
  'a tensor of bytes without a type': (
    calls('torch._utils._rebuild_tensor_v3', storage(kind='Untyped'), *V3, text('int8')),
    'a tensor has no storage',
  ),
  'a tensor of a storage as its type': (
    calls('torch._utils._rebuild_tensor_v3', storage(kind='Untyped'), *V3, b'ctorch\nFloatStorage\n'),
    "it names 'torch.FloatStorage'",
  ),
  'metadata': (
    calls(
      'torch._utils._rebuild_tensor_v2', storage(), b'K\0', b')', b')', b'\x89', b'}', b'}' + text('conj') + b'\x88s'
    ),
    'a tensor has metadata, which is not read',
  ),
  'an id that is none': (text('0') + b'Q', 'a storage is damaged'),
  'an unknown storage': (storage(kind='QInt8'), "it names 'torch.QInt8Storage'"),
  'nested lists': (b']' * 60 + b'a' * 59, 'it nests containers more than 50 levels deep'),
  'a list in itself': (b']q\0h\0a', 'it nests containers more than 50 levels deep'),
  # Hashing the tuple would take 2^100 steps.
  'a tuple of tuples as key': (b')' + b'2\x86' * 100 + b'}', 'its pickle has the instruction DUP'),
  'a tuple as key': (b'})K\1s', 'a dictionary has a key that is no string or number'),
  'a tuple of tuples': (b')' + b''.join(b'q\0h\0\x86' for _ in range(100)), 'it nests containers more than 50 levels'),
  'negative size': (named(tensor(shape=(-2, 3))), 'a tensor has a size, stride or offset that is negative'),
  'negative stride': (named(tensor(strides=(-3, 1))), 'a tensor has a size, stride or offset that is negative'),
  'negative offset': (named(tensor(offset=-1)), 'a tensor has a size, stride or offset that is negative'),
  'a size that is no number': (
    calls('torch._utils._rebuild_tensor', storage(), b'K\0', several(b'\x88'), several(b'K\1')),
    'a tensor has a size, stride or offset that is negative, too large or no number',
  ),
  'too many dimensions': (
    named(tensor(shape=(1,) * 33, strides=(1,) * 33)),
    'a tensor has 33 dimensions and 33 strides',
  ),
  'missing strides': (named(tensor(strides=(3,))), 'a tensor has 2 dimensions and 1 strides'),
  'larger than its storage': (
    named(tensor(offset=1)),
    'a tensor of shape [2, 3] is larger than its storage of 6 elements',
  ),
  'stride beyond its storage': (named(tensor(strides=(4, 1))), 'a tensor of shape [2, 3] is larger than its storage'),
  'a huge empty tensor': (named(tensor(shape=(0, 2**40, 2**40), strides=(1, 1, 1))), 'a tensor of shape [0, 1099511'),
  'one number repeated': (
    named(tensor(shape=(2**40,), strides=(0,))),
    'its tensors have 4,398,046,511,104 bytes, more than 2,147,483,648',
  ),
  'a storage with other bytes': (named(tensor(of=storage(7))), "storage '0' has 24 bytes instead of 28"),
  'no storage': (named(tensor(of=storage(key='1'))), "it lacks the storage 'archive/data/1'"),
  'a storage outside': (
    named(tensor(of=storage(key='../data.pkl'))),
    "it lacks the storage 'archive/data/../data.pkl'",
  ),
  'a list': (b']' + tensor() + b'a', 'it holds something else than a state dict'),
  'no tensors': (
    named(named(b'K\1'), 'state_dict'),
    'it has no state dict: no tensors by name, and none under state_dict',
  ),
  'numbered tensors': (b'}K\1' + tensor() + b's', 'it has tensors whose names are no strings'),
  'half a dictionary': (b'}(' + text('a') + b'u', 'its pickle is damaged'),
  'an empty stack': (b'\x85', 'its pickle is damaged'),
  'an unknown memo': (b'h\x07', 'its pickle is damaged'),
  'no mark': (b't', 'its pickle is damaged'),
  'cut short': (b'X\xff\xff\xff\x7fabc', 'its pickle is damaged or cut short'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_pickles_are_refused(tmp_path, case, monkeypatch):
  monkeypatch.chdir(tmp_path)
  body, expected = HOSTILE[case]
  assert reason(archive(tmp_path / 'a', body)).startswith(expected)
  assert os.listdir() == ['a']


def test_memos_with_huge_numbers_cost_nothing(tmp_path):
  body = named(tensor() + b'r\xff\xff\xff\xff')
  assert read_tensors(archive(tmp_path / 'a', body))['weight'].shape == (2, 3)


def test_long_arguments_are_counted_at_every_call(tmp_path, monkeypatch):
  ordered = b'ccollections\nOrderedDict\n'
  assert read_tensors(archive(tmp_path / 'a', ordered + b']' + several(text('weight'), tensor()) + b'a\x85R'))
  repeated = b''.join(ordered + b'h\0\x85R0' for _ in range(100))
  body = b']q\0(' + several(b'K\1', b'K\2') * 100 + b'e0' + repeated + named(tensor())
  path = archive(tmp_path / 'b', body)
  assert len(body) < 5000 and read_tensors(path)
  monkeypatch.setattr(tensor_pickle, 'MOST_INSTRUCTIONS', 5000)
  assert reason(path) == 'its pickle has more than 5,000 instructions'


def test_containers_in_containers_are_counted(tmp_path, monkeypatch):
  path = archive(tmp_path / 'a', b']q\0(' + b'h\0' * 80 + b'e')
  assert reason(path) == 'it nests containers more than 50 levels deep'
  monkeypatch.setattr(tensor_pickle, 'MOST_INSTRUCTIONS', 100)
  assert reason(path) == 'it nests the same containers too many times'


def test_limits(tmp_path, monkeypatch):
  path = archive(tmp_path / 'a', named(tensor()))
  for module, name, limit, expected in (
    (tensor_pickle, 'MOST_INSTRUCTIONS', 10, 'its pickle has more than 10 instructions'),
    (tensor_pickle, 'LARGEST_PICKLE', 10, 'its pickle is longer than 10 bytes'),
    (pytorch_file, 'LARGEST_FILE', 10, 'it has more than 10 bytes'),
  ):
    with monkeypatch.context() as patched:
      patched.setattr(module, name, limit)
      assert reason(path) == expected


def test_hostile_archives_are_refused(tmp_path):
  body, zeros, path = named(tensor()), [('data/0', bytes(24))], tmp_path / 'a'
  archive(path, body, zeros, zipfile.ZIP_DEFLATED)
  assert reason(path) == "its archive compresses 'archive/data.pkl', which PyTorch does not"
  with pytest.warns(UserWarning, match='Duplicate'):
    archive(path, body, zeros * 2)
  assert reason(path) == "its archive has two entries 'archive/data/0'"
  assert reason(archive(path, body, [*zeros, ('b/data.pkl', b'')])) == 'expected one data.pkl in the archive, found 2'
  assert reason(archive(path, body, [*zeros, ('byteorder', 'middle')])) == "its byte order is 'middle'"
  content = archive(path, body, zeros).read_bytes()
  path.write_bytes(content[:-30])
  assert reason(path).startswith('its archive is damaged or cut short: ')
  # Each entry of the directory claims the same bytes.
  with zipfile.ZipFile(path, 'w') as file:
    file.writestr('archive/data.pkl', bytes(1000))
    for index in range(50):
      info = zipfile.ZipInfo(f'archive/data/{index}')
      info.CRC, info.compress_size, info.file_size = 0, 1000, 1000
      file.filelist.append(info)
      info.header_offset = 0
  assert reason(path) == 'its archive has entries that overlap'


def legacy(path, body, keys=('0',), count=6, system=b'}', version=1001):
  pickles = [
    pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    pickle.dumps(version, 2),
    b'\x80\x02' + system + b'.',
    b'\x80\x02' + body + b'.',
    pickle.dumps(list(keys), 2),
  ]
  path.write_bytes(b''.join(pickles) + struct.pack('<q', count) + np.arange(6, dtype='<f4').tobytes())
  return path


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'keys': ()}, "it lacks the storage '0'"),
    ({'keys': ('0', '1')}, "it has a storage '1' that no tensor uses"),
    ({'keys': (['0'],)}, 'it has a storage'),
    ({'keys': ('0', '0')}, "it is cut short: storage '0' should have 24 bytes"),
    ({'count': 5}, "storage '0' does not have 6 elements"),
    ({'version': 1000}, 'its header is damaged'),
    ({'system': b'N'}, 'its header is damaged'),
    ({'system': b'}' + text('little_endian') + b'\x89s'}, 'it was written on a big-endian machine'),
    (
      {'body': named(several(tensor(), tensor(of=storage(7))))},
      'its tensors disagree about the size or type of a storage',
    ),
    ({'body': named(RUNS)}, "it names 'os.system'"),
  ],
)
def test_hostile_files_of_the_old_format_are_refused(tmp_path, changes, expected):
  arguments = {'body': named(tensor())} | changes
  assert reason(legacy(tmp_path / 'a', **arguments)).startswith(expected)


def test_the_old_format(tmp_path):
  found = read_tensors(legacy(tmp_path / 'a', named(tensor(name='_rebuild_tensor_v2'))))
  np.testing.assert_array_equal(found['weight'], np.float32([[0, 1, 2], [3, 4, 5]]))


def test_what_is_no_file_of_weights(tmp_path):
  path = tmp_path / 'a'
  assert refusal(path) == f'{path} does not exist; name a file of PyTorch weights'
  assert refusal(tmp_path) == f'{tmp_path} cannot be read (Is a directory); name a file of PyTorch weights'
  os.mkfifo(path)
  assert refusal(path) == f'{path} cannot be read (Not a regular file); name a file of PyTorch weights'
  path.unlink()
  for content, expected in (
    (b'', 'expected a file that torch.save wrote, or safetensors'),
    (b'\x89PNG', 'expected a file that torch.save wrote, or safetensors'),
    (pickle.dumps({'a': 1}, 2), 'it is a pickle, but not one that torch.save wrote'),
    (bytes(8) + b'{}', 'Error while deserializing'),
  ):
    path.write_bytes(content)
    assert reason(path).startswith(expected)


CONTENTS = [
  (FOLDER / 'zip.pth').read_bytes(),
  (FOLDER / 'legacy.pth').read_bytes(),
  safetensors_bytes({'a': np.zeros((2, 3), np.float32), 'b': np.zeros(3, np.float16)}),
]


@pytest.mark.parametrize('seed', range(3))
def test_damaged_files_give_arrays_or_one_line(tmp_path, seed):
  random, content, path = np.random.default_rng(seed), CONTENTS[seed], tmp_path / 'a'
  # Most flips in pickles and headers, which are at the beginning.
  for turn in range(400):
    damaged = bytearray(content)
    if turn % 4 == 0:
      del damaged[random.integers(len(content)) :]
    for _ in range(random.integers(1, 4)):
      if damaged:
        damaged[random.integers(len(damaged))] = random.integers(256)
    path.write_bytes(damaged)
    try:
      found = read_tensors(path)
    except UserError as error:
      assert '\n' not in str(error)
    else:
      assert all(isinstance(array, np.ndarray) and array.size < 100 for array in found.values())


@pytest.mark.parametrize('seed', range(2))
def test_damaged_pickles_give_a_value_or_one_line(seed):
  # Without the archive's checksum, which hides the pickle's own defences.
  random = np.random.default_rng(seed)
  with zipfile.ZipFile(FOLDER / 'zip.pth') as file:
    content = file.read(next(name for name in file.namelist() if name.endswith('data.pkl')))
  for _ in range(500):
    damaged = bytearray(content)
    for _ in range(random.integers(1, 6)):
      damaged[random.integers(len(damaged))] = random.integers(256)
    try:
      tensor_pickle.load_pickle(bytes(damaged[: random.integers(1, 2 * len(damaged))]))
    except tensor_pickle.Refused as error:
      assert '\n' not in str(error)
