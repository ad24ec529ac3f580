"""The training step on two CPU devices: a process of its own, because devices are counted once, when jax starts."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import jax

from benchmarks.network import Size, our_network, our_training_step, random_state


@contextlib.contextmanager
def two_device_step(size: Size) -> Iterator[Callable[[], None]]:
  """Starts the process; gives a function that has it train for one step more and waits for its end."""
  command = [sys.executable, '-m', 'benchmarks.two_devices', json.dumps(asdict(size))]
  root = Path(__file__).resolve().parents[1]
  env = os.environ | {'JAX_PLATFORMS': 'cpu'}
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, env=env, text=True
  ) as process:

    def step():
      process.stdin.write('step\n')
      process.stdin.flush()
      if not process.stdout.readline():
        raise RuntimeError('the process with two devices has ended; its reason is above')

    yield step


def serve() -> None:
  """Takes one step for each line of stdin, and answers it with a line."""
  size = Size(**json.loads(sys.argv[1]))
  jax.config.update('jax_num_cpu_devices', 2)
  step = our_training_step(our_network(size), size, random_state(size), jax.devices()[:2])
  for _ in sys.stdin:
    step()
    print('done', flush=True)


if __name__ == '__main__':
  serve()
