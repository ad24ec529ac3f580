"""Writes safetensors of every type, which `safetensors.numpy` does not."""

import json

NAMES = {'float': 'F', 'int': 'I', 'uint': 'U', 'bfloat': 'BF', 'complex': 'C'}
OTHER = {'bool': 'BOOL', 'float8_e4m3fn': 'F8_E4M3', 'float8_e5m2': 'F8_E5M2'}


def safetensors_bytes(arrays):
  header, data = {}, b''
  for name, array in arrays.items():
    kind = array.dtype.name
    letters = kind.rstrip('0123456789')
    code = OTHER.get(kind) or NAMES[letters] + kind.removeprefix(letters)
    start, data = len(data), data + array.tobytes()
    header[name] = {'dtype': code, 'shape': array.shape, 'data_offsets': [start, len(data)]}
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text + data
