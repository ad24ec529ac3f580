"""The service beside the bundle's own `run.py`, on requests of single images.

Of `--bundle=DIR`, or else of two: `pretrained/`, so small that HTTP and decoding take longer than the network, and the
paper's PN3-ddd with random weights and a budget of 50 %. For each a row.

First at saturation: so many `--connections` send their next image as soon as they have an answer. Then run.py in a
process of its own decodes the same files and predicts them in batches of 64; `share_of_run` compares both, `batch_ms`
and `image_ms` are what run.py takes to predict a batch and one image, `watch_percent` and `watch_image_percent` what
the watch of a calibrated bundle takes for the answers, of that. The two alternate `--rounds` times; medians. Then each
`--rate`, by default half of what was answered: requests start at fixed times, whether or not it keeps up, each on an
idle connection or a new one. What sends is a process of its own, on the same cores.

Latencies are from the start of a request to its answer: for those answered (200) and those refused (503).
`sent_late_p99_ms` says how late requests started: if it is large, this machine is too slow to offer that rate.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import io
import itertools
import json
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cli
from benchmarks.own_process import with_huge_pages
from benchmarks.timing import in_turn
from paranet_jax.host.arguments import positive
from paranet_jax.host.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 64
WARM_UP = 1.0
"""Seconds at saturation that do not count."""
LONGEST = 60
"""Seconds after which a request counts as lost."""


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__)
  parser.add_seconds()
  parser.add_argument('--bundle', type=Path, help='an exported bundle (default: two, see above)')
  parser.add_rounds(3)
  parser.add_argument('--connections', type=positive, default=128, help='at saturation (default: 128)')
  parser.add_argument('--rate', type=float, action='append', default=[], help='requests per second; may be repeated')
  parser.add_argument('--serve', default='', help='more flags of serve.py')
  return cli.run(parser, measure, argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """`rows`: for each bundle images/s at saturation and by run.py, `share_of_run`, `batch_ms`, and `rates`."""
  with with_huge_pages(False):  # Neither the service nor run.py asks for them.
    return {'rows': _rows(options)}


def _rows(options: argparse.Namespace) -> list[dict[str, Any]]:
  if options.bundle:
    return [_measure(options, options.bundle, str(options.bundle))]
  with tempfile.TemporaryDirectory() as folder:
    pretrained = Path(folder) / 'pretrained'
    cli.progress('export ...')
    command = [sys.executable, '-m', 'paranet_jax.export', '--workdir=pretrained', f'--out={pretrained}']
    subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=True)
    full = Path(_in_process('write', Path(folder) / 'full')['bundle'])
    return [
      _measure(options, pretrained, 'PN3-ddd of pretrained/'),
      _measure(options, full, 'PN3-ddd, random weights, budget 50 %'),
    ]


def _measure(options: argparse.Namespace, bundle: Path, what: str) -> dict[str, Any]:
  command = [sys.executable, str(ROOT / 'examples/serve.py'), f'--bundle={bundle}', '--port=0']
  server = subprocess.Popen([*command, *options.serve.split()], stdout=subprocess.PIPE, text=True)
  line = server.stdout.readline()
  if not line:
    raise UserError(f'expected a service, found exit code {server.wait()}; see its line above')
  port = line.partition('http://127.0.0.1:')[2].partition('/')[0]
  try:
    turns = []
    for _ in range(options.rounds):
      cli.progress('the service at saturation, then run.py ...')
      served = _in_process('saturate', port, options.connections, options.seconds, bundle)
      turns.append(served | _in_process('run', bundle, options.seconds))
    found = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    found['share_of_run'] = statistics.median(turn['service_per_s'] / turn['run_per_s'] for turn in turns)
    rows = []
    for rate in options.rate or [found['service_per_s'] / 2]:
      cli.progress(f'{rate:.0f} requests/s ...')
      rows.append(_in_process('offer', port, rate, options.seconds, bundle))
  finally:
    server.send_signal(signal.SIGTERM)
    server.wait()
  return {'what': what} | found | {'rates': rows}


def _in_process(program: str, *arguments: Any) -> dict[str, Any]:
  """What one of `PROGRAMS` prints."""
  command = [sys.executable, __file__, program, *map(str, arguments)]
  return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def write(folder: str) -> dict[str, Any]:
  """Writes PN3-ddd with random weights into a new folder; returns its `bundle`."""
  from benchmarks import deploy, early_exit, network  # They import JAX, which no other process here needs.

  Path(folder).mkdir()
  subject = early_exit.untrained(network.Size(), deploy.IN_BATCHES)
  deploy.write(Path(folder), subject, argparse.Namespace(workdir=None, dtype='float32'))
  return {'bundle': str(Path(folder) / deploy.BUNDLE)}


def saturate(port: str, connections: str, seconds: str, bundle: str) -> dict[str, float]:
  """Images/s answered, and percent refused, with so many connections that always have a request under way."""
  requests, counts, sent = _requests(encoded_images(Path(bundle))), Counter(), 0
  with contextlib.ExitStack() as sockets, selectors.DefaultSelector() as selector:
    for _ in range(int(connections)):
      sock = sockets.enter_context(socket.create_connection(('127.0.0.1', int(port))))
      selector.register(sock, selectors.EVENT_READ, bytearray())
      sock.sendall(requests[sent % IMAGES])
      sent += 1
    started = time.perf_counter()
    first, end = started + WARM_UP, started + WARM_UP + float(seconds)
    while time.perf_counter() < end:
      for key, _ in selector.select(1):
        key.data.extend(key.fileobj.recv(65536))
        if not _is_whole(key.data):
          continue
        if first < time.perf_counter() < end:
          counts[int(key.data[9:12])] += 1
        key.data.clear()
        key.fileobj.sendall(requests[sent % IMAGES])
        sent += 1
  return {'service_per_s': counts[200] / float(seconds), 'refused_percent': 100 * counts[503] / max(counts.total(), 1)}


def _is_whole(response: bytearray) -> bool:
  head = response.find(b'\r\n\r\n')
  if head < 0:
    return False
  length = re.search(rb'content-length: (\d+)', response[:head], re.IGNORECASE)
  return len(response) >= head + 4 + int(length[1])


def _requests(images: list[bytes]) -> list[bytes]:
  head = 'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n'
  return [head.format(len(image)).encode() + image for image in images]


def run_file(bundle: str, seconds: str) -> dict[str, float]:
  """Images/s of the bundle's run.py from files in memory, and milliseconds of a batch and an image without decoding.

  `watch_percent` and `watch_image_percent` are what its watch takes for their answers, of these milliseconds.
  """
  spec = importlib.util.spec_from_file_location('bundle_run', Path(bundle) / 'run.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  loaded, files = module.load(bundle), encoded_images(Path(bundle))
  side, _, channels = loaded.image_shape

  def decoded() -> np.ndarray:
    return np.stack([module.decode_image(file, side, channels) for file in files])

  def both() -> None:
    loaded.predict(decoded())

  images = decoded()
  functions = {
    'both': both,
    'batch': partial(loaded.predict, images),
    'image': partial(loaded.predict, images[:1]),
  }
  if usual := usual_answers(module, Path(bundle)):
    watch = module.Watch(loaded)
    one_by_one = [tuple(each[place : place + 1] for each in batch) for batch in usual for place in range(IMAGES)]
    batches, singles = itertools.cycle(usual), itertools.cycle([module.Predictions(*each) for each in one_by_one])
    functions |= {'watch': lambda: watch.see(next(batches)), 'watch_image': lambda: watch.see(next(singles))}
  found = in_turn(functions, 1, float(seconds) / 2)
  if usual and watch.alarm:
    raise UserError(f'expected no drift in usual answers, found {watch.line()}; measure again')
  told = {'run_per_s': IMAGES / found['both'], 'batch_ms': 1e3 * found['batch'], 'image_ms': 1e3 * found['image']}
  if usual:
    told['watch_percent'] = 100 * found['watch'] / found['batch']
    told['watch_image_percent'] = 100 * found['watch_image'] / found['image']
  return told


def usual_answers(module: ModuleType, bundle: Path) -> list[Any]:
  """1,000 batches of answers such as calibration saw; none of a bundle that was not calibrated."""
  seen, rng = json.loads((bundle / 'exits.json').read_text()).get('seen'), np.random.default_rng(0)
  if not seen:
    return []
  cells = [
    (exit_number, (low + high) / 2)
    for exit_number, edges in enumerate(seen['edges'], 1)
    for low, high in itertools.pairwise([0, *edges, 1])
  ]
  counts, classes = np.concatenate(seen['counts']), np.array(seen['classes'])
  batches = []
  for _ in range(1000):
    exits, tops = np.array(cells)[rng.choice(len(cells), IMAGES, p=counts / counts.sum())].T
    labels = rng.choice(len(classes), IMAGES, p=classes / classes.sum())
    probabilities = np.zeros((IMAGES, len(classes)), np.float32)
    probabilities[np.arange(IMAGES), labels] = tops
    batches.append(module.Predictions(labels, probabilities, exits.astype(int), np.zeros(IMAGES, int)))
  return batches


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
    self._requests = _requests(images)

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


def offer(port: str, rate: str, seconds: str, bundle: str) -> dict[str, Any]:
  """A row of one rate."""
  load = Load(int(port), encoded_images(Path(bundle)))
  asyncio.run(load.offer(float(rate), float(seconds)))
  return summary(float(rate), float(seconds), load.outcomes)


PROGRAMS = {'saturate': saturate, 'run': run_file, 'offer': offer, 'write': write}
"""What runs in processes of their own."""


if __name__ == '__main__':
  if len(sys.argv) > 2 and sys.argv[1] in PROGRAMS:
    print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))
  else:
    sys.exit(main())
