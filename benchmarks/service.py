"""The service at a constant rate of requests, whether or not it keeps up: `--bundle=DIR --rate=100 --rate=600`.

Requests start at fixed times, each on an idle connection or a new one, from a process of its own. Latencies are from
the start of a request to its answer: for those answered (200) and those refused (503). `sent_late_p99_ms` says how late
requests started: if it is large, this machine is too slow to offer that rate.
"""

import argparse
import asyncio
import io
import json
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cli
from paranet_jax.host.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 64
LONGEST = 60
"""Seconds after which a request counts as lost."""


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__)
  parser.add_seconds()
  parser.add_argument('--bundle', type=Path, required=True, help='an exported bundle')
  parser.add_argument('--rate', type=float, action='append', help='requests per second; may be repeated (default: 600)')
  parser.add_argument('--serve', default='', help='more flags of serve.py')
  return cli.run(parser, measure, argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """A row for each rate."""
  command = [sys.executable, str(ROOT / 'examples/serve.py'), f'--bundle={options.bundle}', '--port=0']
  server = subprocess.Popen([*command, *options.serve.split()], stdout=subprocess.PIPE, text=True)
  line = server.stdout.readline()
  if not line:
    raise UserError(f'expected a service, found exit code {server.wait()}; see its line above')
  port = int(line.partition('http://127.0.0.1:')[2].partition('/')[0])
  rows = []
  try:
    for rate in options.rate or [600.0]:
      cli.progress(f'{rate:g} requests/s ...')
      command = [sys.executable, __file__, str(port), str(rate), str(options.seconds), str(options.bundle)]
      rows.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout))
  finally:
    server.send_signal(signal.SIGTERM)
    server.wait()
  return {'rows': rows}


def encoded_images(bundle: Path) -> list[bytes]:
  """PNG files of noise, of the bundle's size."""
  from PIL import Image

  side = json.loads((bundle / 'preprocessing.json').read_text())['side']
  files = []
  for pixels in np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, 3), np.uint8):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, 'PNG')
    files.append(out.getvalue())
  return files


class Load:
  """Requests of one service. outcomes: (status, seconds, seconds late) of each; 0: reset or lost."""

  def __init__(self, port: int, images: list[bytes]):
    self._port, self._idle, self.outcomes = port, [], []
    head = 'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n'
    self._requests = [head.format(len(image)).encode() + image for image in images]

  async def offer(self, rate: float, seconds: float) -> None:
    """Sends requests at this rate for so long, and waits for their answers."""
    started, tasks = time.perf_counter(), []
    for number in range(int(rate * seconds)):
      due = started + number / rate
      if (wait := due - time.perf_counter()) > 0:
        await asyncio.sleep(wait)
      tasks.append(asyncio.create_task(self._ask(self._requests[number % len(self._requests)], due)))
    await asyncio.gather(*tasks)

  async def _ask(self, request: bytes, due: float) -> None:
    started = time.perf_counter()
    try:
      status = await asyncio.wait_for(self._status(request), LONGEST)
    except (TimeoutError, OSError, asyncio.IncompleteReadError):
      status = 0
    self.outcomes.append((status, time.perf_counter() - started, started - due))

  async def _status(self, request: bytes) -> int:
    while self._idle and self._idle[-1][0].at_eof():  # The service closes connections that have been idle for long.
      self._idle.pop()[1].close()
    reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection('127.0.0.1', self._port)
    writer.write(request)
    head = await reader.readuntil(b'\r\n\r\n')
    fields = dict(line.lower().split(b': ', 1) for line in head.split(b'\r\n')[1:-2])
    await reader.readexactly(int(fields[b'content-length']))
    if fields.get(b'connection') == b'close':
      writer.close()
    else:
      self._idle.append((reader, writer))
    return int(head.split(b' ', 2)[1])


def summary(rate: float, seconds: float, outcomes: list[tuple[int, float, float]]) -> dict[str, Any]:
  """One row: counts, and milliseconds of the answered and the refused."""
  counts, row = Counter(status for status, _, _ in outcomes), {'offered_per_s': rate}
  row['answered_per_s'] = counts[200] / seconds
  row['refused_percent'] = 100 * counts[503] / len(outcomes)
  row['lost'] = len(outcomes) - counts[200] - counts[503]
  row['sent_late_p99_ms'] = 1e3 * statistics.quantiles([late for *_, late in outcomes], n=100)[98]
  for name, status in (('answered', 200), ('refused', 503)):
    ms = [1e3 * took for found, took, _ in outcomes if found == status]
    cuts = statistics.quantiles(ms, n=100, method='inclusive') if len(ms) > 1 else [None] * 99
    row |= {f'{name}_p50_ms': cuts[49], f'{name}_p99_ms': cuts[98]}
  return row


def offer(port: str, rate: str, seconds: str, bundle: str) -> None:
  """The program of the process that sends: prints a row as JSON."""
  load = Load(int(port), encoded_images(Path(bundle)))
  asyncio.run(load.offer(float(rate), float(seconds)))
  print(json.dumps(summary(float(rate), float(seconds), load.outcomes)))


if __name__ == '__main__':
  if len(sys.argv) == 5 and sys.argv[1].isdecimal():
    offer(*sys.argv[1:])
  else:
    sys.exit(main())
