"""What answers in a process of its own: a bundle by ONNX Runtime or OpenVINO, the network by JAX, PyTorch or earlyon.

Run as a program it says what starting takes. Nothing that one of them does not need is imported for it.
"""

import importlib.util
import json
import pickle
import resource
import sys
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BUNDLE, SUBJECT = 'bundle', 'subject.pickle'
BATCH = 64

Answer = Callable[['Point', np.ndarray, int], np.ndarray]
"""From a point, images [N, H, W, C] and how many of them at once to labels [N]."""


class Point(NamedTuple):
  """When images leave.

  thresholds: on the confidence scale, one for each exit; None: no image leaves there. last: the index of the exit at
  which all leave who have not before.
  """

  thresholds: tuple[float | None, ...]
  last: int


class Network(NamedTuple):
  """What JAX and PyTorch are given: a model, its variables (NumPy), a plan, and how images are normalized.

  `model` and `plan` are pickled by themselves, since reading them imports JAX.
  """

  model: bytes
  plan: bytes
  variables: dict[str, Any]
  plan_fields: dict[str, Any]
  all_macs: tuple[int, ...]
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  num_classes: int


def make(kind: str, folder: str) -> Answer:
  """What answers.

  Args:
    kind: one of `RUNTIMES`.
    folder: with the bundle and the `Network`.
  """
  return RUNTIMES[kind](Path(folder))


def _bundle(provider: str, precision: str, folder: Path) -> Answer:
  bundle = _run_file(folder).load(folder / BUNDLE, provider, precision=precision)
  return partial(_answer, lambda point: _at(bundle, point))


def _streams(folder: Path) -> Answer:
  """OpenVINO with its throughput hint, which divides the cores: as many batches at a time as it asks for."""
  import openvino

  module = _run_file(folder)
  wanted = []

  def open_session(path):
    model = openvino.Core().compile_model(str(path), 'CPU', {'PERFORMANCE_HINT': 'THROUGHPUT'})
    wanted.append(model.get_property('OPTIMAL_NUMBER_OF_INFER_REQUESTS'))
    mine = threading.local()

    def session(outputs, inputs):
      if not hasattr(mine, 'request'):
        mine.request = model.create_infer_request()
      found = mine.request.infer(dict(inputs))
      return [np.array(found[name]) for name in outputs]

    return session

  module._openvino = lambda precision, threads, path: open_session(path)
  bundle = module.load(folder / BUNDLE, 'openvino', precision='auto')
  pool = ThreadPoolExecutor(max(wanted))

  def answer(point, images, batch):
    runtime = _at(bundle, point)
    if batch == 1:
      return np.array([found.label for found in pool.map(runtime.predict_one, images)])
    parts = [images[first : first + batch] for first in range(0, len(images), batch)]
    return np.concatenate([found.labels for found in pool.map(runtime.predict, parts)])

  return answer


def _jax(folder: Path) -> Answer:
  from paranet_jax.early.runtime import EarlyExit
  from paranet_jax.host.machine import keep_programs

  keep_programs()  # As EarlyExit.load.
  network: Network = pickle.loads((folder / SUBJECT).read_bytes())
  model, plan = pickle.loads(network.model), pickle.loads(network.plan)
  names = [str(label) for label in range(network.num_classes)]
  early = EarlyExit(model, network.variables, plan, network.image_shape, network.mean, network.std, names)
  return partial(_answer, lambda point: _at(early, point))


def _torch(folder: Path) -> Answer:
  import torch

  from benchmarks.torch_paranet import channels_last, torch_network

  network: Network = pickle.loads((folder / SUBJECT).read_bytes())
  theirs = torch_network(network.variables).to(memory_format=torch.channels_last).eval()

  def as_torch(values):
    # Rows that were taken out are in NumPy's order.
    return torch.from_numpy(values).contiguous(memory_format=torch.channels_last)

  def stage(number):
    @torch.inference_mode()
    def run(carried):
      images = channels_last(carried['images'])
      features = {name: as_torch(values) for name, values in carried.items() if name != 'images'}
      logits, features = theirs.pipeline(number, images, features)
      return {'images': carried['images']} | {name: x.numpy() for name, x in features.items()}, logits.numpy()

    return run

  stages = {number: stage(number) for number in network.plan_fields['exits']}
  names = [''] * network.num_classes
  arguments = network.all_macs, network.image_shape, network.mean, network.std, names
  adaptive = _run_file(folder).Adaptive(network.plan_fields, stages, stages, *arguments)
  return partial(_answer, lambda point: _at(adaptive, point))


def _earlyon(folder: Path) -> Answer:
  import torch

  from benchmarks.earlyon_paranet import EarlyOnParaNet
  from benchmarks.torch_paranet import channels_last, torch_network

  network: Network = pickle.loads((folder / SUBJECT).read_bytes())
  theirs = torch_network(network.variables).to(memory_format=torch.channels_last)
  early = EarlyOnParaNet(theirs, network.num_classes, network.image_shape)
  mean, std = (np.array(values, np.float32) for values in (network.mean, network.std))

  def answer(point, images, batch):
    early.set_thresholds(point.thresholds, point.last)
    labels = []
    for first in range(0, len(images), batch):
      part = (images[first : first + batch] / np.float32(255) - mean) / std
      labels.append(early(channels_last(part))[0].argmax(-1).numpy())
    return np.concatenate(labels)

  return answer


RUNTIMES = {
  'onnxruntime': partial(_bundle, 'cpu', 'float32'),
  'openvino': partial(_bundle, 'openvino', 'float32'),
  'openvino_auto': partial(_bundle, 'openvino', 'auto'),
  'openvino_streams': _streams,
  'ours': _jax,
  'eager': _torch,
  'earlyon': _earlyon,
}


def _run_file(folder: Path) -> types.ModuleType:
  """The bundle's own run.py."""
  spec = importlib.util.spec_from_file_location('bundle_run', folder / BUNDLE / 'run.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _at(adaptive: Any, point: Point) -> Any:
  thresholds = [at if k < point.last else 0.0 for k, at in enumerate(point.thresholds)]
  chosen = adaptive.with_thresholds(thresholds)
  return chosen.with_budget(chosen.macs[chosen.exits[point.last]])


def _answer(choose: Callable[[Point], Any], point: Point, images: np.ndarray, batch: int) -> np.ndarray:
  runtime = choose(point)
  if batch == 1:
    return np.array([runtime.predict_one(image).label for image in images])
  return np.concatenate(
    [runtime.predict(images[first : first + batch]).labels for first in range(0, len(images), batch)]
  )


def peak_memory_mb(status: Path = Path('/proc/self/status')) -> float:
  """The most memory that this process has had resident."""
  if status.exists():  # Linux tells of its `getrusage` that of the process it was started by, if that had more.
    (line,) = (line for line in status.read_text().splitlines() if line.startswith('VmHWM:'))
    return int(line.split()[1]) / 1e3
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
  """Prints `start_s`, to the first answer to one image, and `peak_mb` of memory after a batch, at the last exit."""
  kind, folder, started, exits = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
  answer, point = make(kind, folder), Point((None,) * exits, exits - 1)
  shape = json.loads((Path(folder) / BUNDLE / 'preprocessing.json').read_text())
  images = np.zeros((BATCH, shape['side'], shape['side'], shape['channels']), np.uint8)
  answer(point, images[:1], 1)
  seconds = time.time() - started
  answer(point, images, BATCH)
  print(json.dumps({'start_s': seconds, 'peak_mb': peak_memory_mb()}))


if __name__ == '__main__':
  main()
