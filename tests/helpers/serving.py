"""The service as a process, and what clients send to it."""

import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / 'examples'


class Reply(NamedTuple):
  """A response."""

  status: int
  headers: dict[str, str]
  body: Any


class Server:
  """`python examples/serve.py`, where importing JAX or this package fails; its first line says where it listens."""

  def __init__(self, folder: Path, bundle: Path, *flags: str):
    blocked = folder / 'blocked'
    blocked.mkdir(exist_ok=True)
    for name in ('jax', 'flax', 'paranet_jax', 'tensorflow', 'torch'):
      (blocked / f'{name}.py').write_text('raise ImportError("the service does without")\n')
    self.process = subprocess.Popen(
      [sys.executable, '-W', 'error', EXAMPLES / 'serve.py', f'--bundle={bundle}', '--port=0', '--threads=1', *flags],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=folder,
      env=os.environ | {'PYTHONPATH': str(blocked)},
    )
    self.line = self.process.stdout.readline()
    found = re.fullmatch(
      rf'serving {re.escape(str(bundle))} at http://127\.0\.0\.1:(\d+)/predict; '
      r'its exits take (\d+\.\d\d), (\d+\.\d\d), (\d+\.\d\d) ms an image\n',
      self.line,
    )
    if not found:
      self.process.kill()
    assert found, (self.line, self.process.communicate())
    self.port, self.exit_ms = int(found[1]), [float(text) for text in found.groups()[1:]]

  def connect(self) -> http.client.HTTPConnection:
    """A connection to it."""
    return http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)

  def ask(self, method: str, path: str, body: Any = None, headers: Any = (), over: Any = None) -> Reply:
    """Sends a request, over an open connection or its own."""
    connection = over or self.connect()
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    text = response.read()
    if not over:
      connection.close()
    json_body = response.getheader('content-type') == 'application/json'
    return Reply(response.status, dict(response.getheaders()), json.loads(text) if json_body else text.decode())

  def metrics(self) -> dict[str, float]:
    """Values by name."""
    lines = self.ask('GET', '/metrics').body.splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if not line.startswith('#'))}

  def stop(self, number: int = signal.SIGTERM) -> None:
    """Stops it by a signal, and checks that it prints nothing more."""
    self.process.send_signal(number)
    assert self.process.communicate(timeout=60) == ('', '')
    assert self.process.returncode == 0


def wait_until(holds: Any) -> None:
  """Waits for a condition, for a minute at most."""
  last = time.monotonic() + 60
  while not holds():
    assert time.monotonic() < last
    time.sleep(0.005)


def encoded(seed: int, kind: str = 'PNG', size: tuple[int, int] = (8, 8)) -> bytes:
  """An image of noise."""
  pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, kind)
  return out.getvalue()


def of_pixels(width: int, height: int) -> bytes:
  """A black image of any size in few bytes."""
  out = io.BytesIO()
  Image.new('1', (width, height)).save(out, 'PNG')
  return out.getvalue()


def form(files: Any, fields: Any = (), end: str = '--border--\r\n') -> tuple[bytes, dict[str, str]]:
  """The body of a form and its headers."""
  parts = [f'--border\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'.encode() for n, v in fields]
  head = b'--border\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
  parts += [head + file + b'\r\n' for file in files]
  return b''.join([*parts, end.encode()]), {'Content-Type': 'multipart/form-data; boundary=border'}


PNG = encoded(0)
