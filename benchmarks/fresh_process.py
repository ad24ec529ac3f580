"""Seconds or megabytes, by name, of functions that each run in a process that was just started."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import network, peers
from benchmarks.network import Size
from benchmarks.own_process import with_huge_pages
from paranet_jax.base_config import base_config
from paranet_jax.costs import abstract_variables
from paranet_jax.host.machine import OFF, use_compilation_cache
from paranet_jax.models.layers.backend import compiling_for
from paranet_jax.plan.target import topology_devices
from paranet_jax.steps import init_state, make_eval_step


def in_fresh_process(task: str, size: Size, *, cache: Path | None = None) -> dict:
  """Runs one of `TASKS` in a new process, those of PyTorch with its defaults.

  Args:
    cache: folder of the persistent compilation cache; None: no such cache.

  Returns:
    What the task returns, and `imports`: seconds from the start of the process until jax and the package are there.
  """
  command = [sys.executable, '-m', 'benchmarks.fresh_process', task, json.dumps(asdict(size)), str(time.time())]
  settings = {'JAX_ENABLE_COMPILATION_CACHE': str(cache is not None)}
  settings |= {'PARANET_CACHE_DIR': str(cache)} if cache else {}
  root = Path(__file__).resolve().parents[1]
  with with_huge_pages(task not in peers.TORCH_PEERS):
    environment = os.environ | settings
  process = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, check=True, text=True)
  return json.loads(process.stdout)


def first_step(make_network: Callable[[Size], Any], size: Size) -> dict[str, float]:
  """Seconds to initialise, and to the end of the first training step, initialising included."""
  start = time.perf_counter()
  model = make_network(size)
  state = jax.block_until_ready(init_state(model, network.optimizer(), 0, size.image_shape))
  initialise = time.perf_counter() - start
  network.our_training_step(model, size, state, jax.devices()[:1])()
  return {'initialise': initialise, 'first_step': time.perf_counter() - start}


def torch_first_step(compiled: bool, size: Size) -> dict[str, float]:
  """The same of the peer."""
  torch_paranet = peers.torch_paranet()
  start = time.perf_counter()
  theirs = torch_paranet.TorchParaNet(3, network.NUM_CLASSES, size.layers, size.growth_rate)
  images, labels = network.random_images(size, size.batch), network.random_labels(size.batch)
  step = torch_paranet.training_step(theirs, images, labels, network.TORCH_SGD, compiled='default' if compiled else '')
  initialise = time.perf_counter() - start
  step()
  return {'initialise': initialise, 'first_step': time.perf_counter() - start}


def evaluation(size: Size) -> dict[str, float]:
  """Seconds to compile the evaluation functions of all exits."""
  start = time.perf_counter()
  model = network.our_network(size)
  variables = abstract_variables(model, size.image_shape)
  batch = base_config().eval.batch_size
  images = jax.ShapeDtypeStruct((batch, *size.image_shape), jnp.uint8)
  labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
  mask = jax.ShapeDtypeStruct((batch,), jnp.float32)
  for number in range(1, model.num_exits + 1):
    step = jax.jit(make_eval_step(model, number, network.CIFAR_100, 0.0))
    step.lower(variables['params'], variables['batch_stats'], images, labels, mask).compile()
  return {'compile': time.perf_counter() - start}


def tpu(size: Size) -> dict[str, float]:
  """Seconds to compile the pmapped training step for v5e:2x2, and megabytes of the code, on a machine without a TPU."""
  devices = topology_devices('v5e:2x2')
  state = jax.eval_shape(partial(network.random_state, size))
  *whole, order = network.step_arguments(size, state)
  order = np.stack(np.split(order, len(devices), axis=1))
  start = time.perf_counter()
  with compiling_for('tpu'):
    compiled = network.compiled_step(network.our_network(size), devices).lower(*whole, order).compile()
  seconds = time.perf_counter() - start
  return {'compile': seconds, 'code_mb': compiled.memory_analysis().generated_code_size_in_bytes / 1e6}


TASKS: dict[str, Callable[[Size], dict[str, float]]] = {
  'ours': partial(first_step, network.our_network),
  'linen': partial(first_step, network.linen_network),
  'eager': partial(torch_first_step, False),
  'compile': partial(torch_first_step, True),
  'evaluation': evaluation,
  'tpu': tpu,
}


def main() -> None:
  """Runs the task of the command line and prints its result as JSON."""
  imports = time.time() - float(sys.argv[3])
  use_compilation_cache(None if os.environ['JAX_ENABLE_COMPILATION_CACHE'] == 'True' else OFF)
  print(json.dumps({'imports': imports} | TASKS[sys.argv[1]](Size(**json.loads(sys.argv[2])))))


if __name__ == '__main__':
  main()
