"""A bundle made by hand: random layers, three exits, images of 8 x 8 pixels. Nothing of JAX, and nothing trained."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from paranet_jax.portable import run

SIDE, CHANNELS, CLASSES, EXITS = 8, 3, 5, (1, 2, 3)
_WIDTH = 16


def write(folder: Path, probability: float = 0.6, work: int = 0) -> Path:
  """Writes the bundle.

  Args:
    probability: from which images leave; 1: none does before the last exit.
    work: side of a square matrix that every stage multiplies by itself for each image, so that it takes longer.
  """
  folder.mkdir()
  rng = np.random.default_rng(5)
  for number in EXITS:
    onnx.save(_stage(number, rng, work), folder / f'stage_{number}.onnx')
  threshold = float(run.to_confidence(probability, 'max_prob')) if probability < 1 else None
  _write_json(
    folder / run.EXITS,
    {
      'exits': EXITS,
      'visited': EXITS,
      'score': 'max_prob',
      'confidence_thresholds': [threshold, threshold, 0.0],
      'macs': [10, 20, 30],
      'temperatures': [1.0, 0.9, 0.8],
    },
  )
  _write_json(folder / run.CLASSES, [f'class {index}' for index in range(CLASSES)])
  _write_json(
    folder / run.PREPROCESSING,
    {'side': SIDE, 'channels': CHANNELS, 'mean': [0.5] * CHANNELS, 'std': [0.25] * CHANNELS},
  )
  shutil.copyfile(run.__file__, folder / 'run.py')
  names = [f'stage_{number}' for number in EXITS]
  checksums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
  _write_json(
    folder / run.BUNDLE,
    {
      'schema_version': run.SCHEMA_VERSION,
      'formats': ['onnx'],
      'num_classes': CLASSES,
      'stages': {name: _entry(number) for name, number in zip(names, EXITS, strict=True)},
      'visited_stages': names,
      'all_stages': names,
      'all_macs': [10, 20, 30],
      'checksums': checksums,
    },
  )
  return folder


def _entry(number: int) -> dict:
  return {
    'file': f'stage_{number}.onnx',
    'takes': [{'name': _taken(number)}],
    'gives': [{'name': f'features_{number}'}],
    'keeps': [],
  }


def _taken(number: int) -> str:
  return f'features_{number - 1}' if number > 1 else 'images'


def _stage(number: int, rng: np.random.Generator, work: int) -> onnx.ModelProto:
  inputs = SIDE * SIDE * CHANNELS if number == 1 else _WIDTH
  shape = ['batch', SIDE, SIDE, CHANNELS] if number == 1 else ['batch', _WIDTH]
  weights = {'layer': rng.normal(0, 2 / inputs**0.5, (inputs, _WIDTH)), 'exit': rng.normal(0, 0.5, (_WIDTH, CLASSES))}
  out = f'features_{number}'
  nodes = [
    helper.make_node('Flatten', [_taken(number)], ['flat'], axis=1),
    helper.make_node('MatMul', ['flat', 'layer'], ['sums']),
    helper.make_node('Tanh', ['sums'], [out]),
  ]
  last = out
  if work:
    weights |= {'wide': rng.normal(0, 1 / work, (_WIDTH, work)), 'row': np.array([1]), 'column': np.array([2])}
    weights |= {'none': np.zeros(1)}
    nodes += _busy(out)
    last = 'delayed'
  nodes.append(helper.make_node('MatMul', [last, 'exit'], ['logits']))
  graph = helper.make_graph(
    nodes,
    f'stage_{number}',
    [helper.make_tensor_value_info(_taken(number), TensorProto.FLOAT, shape)],
    [
      helper.make_tensor_value_info('logits', TensorProto.FLOAT, ['batch', CLASSES]),
      helper.make_tensor_value_info(out, TensorProto.FLOAT, ['batch', _WIDTH]),
    ],
    [
      numpy_helper.from_array(values.astype(np.int64 if values.dtype.kind == 'i' else np.float32), name)
      for name, values in weights.items()
    ],
  )
  return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)


def _busy(features: str) -> list[onnx.NodeProto]:
  """Multiplies the outer product of a vector by itself, and adds nothing of it to the features."""
  return [
    helper.make_node('MatMul', [features, 'wide'], ['vector']),
    helper.make_node('Unsqueeze', ['vector', 'row'], ['rows']),
    helper.make_node('Unsqueeze', ['vector', 'column'], ['columns']),
    helper.make_node('MatMul', ['columns', 'rows'], ['square']),
    helper.make_node('MatMul', ['square', 'square'], ['product']),
    helper.make_node('ReduceMean', ['product'], ['mean'], axes=[1, 2], keepdims=0),
    helper.make_node('Unsqueeze', ['mean', 'row'], ['means']),
    helper.make_node('Mul', ['means', 'none'], ['nothing']),
    helper.make_node('Add', [features, 'nothing'], ['delayed']),
  ]


def _write_json(path: Path, value: object) -> None:
  path.write_text(json.dumps(value))
