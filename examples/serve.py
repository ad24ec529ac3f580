"""Serves a bundle that `python -m paranet_jax.export` wrote over HTTP. Needs examples/requirements.txt, but not JAX.

  python examples/serve.py --bundle=DIR
  curl --data-binary @photo.png localhost:8000/predict
  curl -F image=@a.png -F image=@b.jpg -F deadline_ms=20 localhost:8000/predict

service.py describes the answers. The server runs the bundle's run.py, so serve only bundles that you trust. It has
neither TLS nor limits on connections, so put a proxy in front of it where other machines can reach it. User errors are
one line and exit code 2.

On SIGTERM and Control-C it closes its port, and answers the requests that it has. Kept connections may send requests
for another two seconds, which are answered with Connection: close. It then exits with code 0.
"""

import argparse
import gc
import importlib.util
import logging
import os
import re
import shlex
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn


class UserError(Exception):
  """One line that says what was expected, what was found, and what fixes it."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments, those of sys.argv if None.

  Returns:
    The exit code: 0: stopped by a signal; 2: a user error; 130: interrupted before it served.
  """
  try:
    _serve(_parse(argv))
  except UserError as error:
    print('error:', _printable(' '.join(str(error).split())), file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('stopped at once', file=sys.stderr)
    return 130
  return 0


def _printable(text: str) -> str:
  # A path may have bytes that are no text, and lines that are several.
  return ''.join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}; see --help')


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = _Parser(prog='python serve.py', description='Serves an exported bundle by HTTP.', allow_abbrev=False)
  add = parser.add_argument
  add('--bundle', type=Path, required=True, help='Folder of the bundle.')
  add('--host', type=_host, default='127.0.0.1', help='Address to listen on (default: 127.0.0.1, this machine only).')
  add('--port', type=_port, default=8000, help='0: any free port (default: 8000).')
  add('--queue', type=_count, default=256, help='Most images accepted and not answered yet (default: 256).')
  add('--batch', type=_count, default=64, help='Most images per run of a stage (default: 64).')
  add('--max-bytes', type=_count, default='10M', help='Of a request (default: 10M).')
  add('--max-pixels', type=_count, default='25M', help='Of an image (default: 25M).')
  add('--max-decoding', type=_count, default='512M', help='Bytes to decode the images of a request (default: 512M).')
  add('--max-wait-ms', type=_count, help='Longest expected wait (default: 500, or two full batches).')
  add('--cors', metavar='ORIGIN', type=_origin, action='append', default=[], help='Site whose pages may call it.')
  add('--provider', default='cpu', help='cpu (ONNX Runtime) or openvino (default: cpu).')
  add('--threads', type=int, help='Per stage (default: one per core; but one less, for HTTP, if stages are fast).')
  add('--watch', type=Path, metavar='STATE.json', help='Test whether answers still look as in calibration.')
  add('--alpha', type=float, help='Probability of a false alarm of --watch (default: 0.01).')
  add('--on-drift', choices=('warn', 'safe'), help='safe: after an alarm of --watch, no image exits early.')
  given = parser.parse_args(argv)
  if given.watch is None and (given.alpha, given.on_drift) != (None, None):
    raise UserError('--alpha and --on-drift belong to --watch, found none; set --watch, or leave them out')
  return given


def _host(text: str) -> str:
  try:
    known = bool(text.encode('idna'))  # The system takes '', such as of a variable that is not set, for every address.
  except UnicodeError:
    known = False
  if not known:
    raise argparse.ArgumentTypeError(f'expected an address such as 127.0.0.1, or 0.0.0.0 for all, found {text!r}')
  return text


def _port(text: str) -> int:
  if not text.isdecimal() or int(text) > 65535:
    raise argparse.ArgumentTypeError(f'expected a port from 0 to 65535, found {text}')
  return int(text)


def _origin(text: str) -> str:
  """An origin as browsers send it: in lower case, and without the port that its scheme has anyway."""
  found = re.fullmatch(r'(https?)://([a-z\d._-]+|\[[a-f\d:.]+\])(?::(\d{1,5}))?', text.lower())
  if text == '*':
    return text
  if not found or int(found[3] or 0) > 65535:
    raise argparse.ArgumentTypeError(f'expected an origin such as https://example.com:8443, or *, found {text!r}')
  scheme, host, port = found.groups()
  return f'{scheme}://{host}' + (f':{int(port)}' if port and int(port) != _PORTS[scheme] else '')


_FAST = 0.0005
"""Seconds of all cores for an image of a full batch: below it HTTP and decoding keep much of a core busy."""
_SWITCH = 0.001
"""Seconds for which a thread may keep the interpreter while another waits; by default 5 ms, as long as some stages."""
_PORTS = {'http': 80, 'https': 443}


def _count(text: str) -> int:
  scale = {'K': 10**3, 'M': 10**6, 'G': 10**9}.get(text[-1:].upper(), 1)
  digits = text[:-1] if scale > 1 else text
  if not digits.isdecimal() or not int(digits):
    raise argparse.ArgumentTypeError(f'expected an integer of 1 or more, such as 64 or 10M, found {text!r}')
  return int(digits) * scale


def _serve(given: argparse.Namespace) -> None:
  try:
    import onnxruntime  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn
    from batching import Scheduler
    from connections import KEEP_ALIVE, LONGEST_STOP, Protocol, Server
    from decoding import Decoders
    from PIL import Image
    from service import MAX_WAIT, Predictor, make_app
    from uploads import Uploads
  except ImportError as error:
    needs = shlex.quote(str(Path(__file__).with_name('requirements.txt')))
    raise UserError(f'expected {error.name} to serve, found none; pip install -r {needs}') from error
  sys.setswitchinterval(_SWITCH)
  logging.getLogger('python_multipart').setLevel(logging.ERROR)  # It warns about malformed forms.
  warnings.filterwarnings('ignore', module='PIL')  # Pillow warns about odd but readable files.
  Image.init()  # Otherwise the first image waits for it.
  runtime = _load_runtime(given.bundle)
  # Beyond twice this, Pillow refuses an image without its size.
  Image.MAX_IMAGE_PIXELS = given.max_pixels
  if not hasattr(runtime, 'TooManyPixels'):  # Version 0.1.0, whose run.py has no limits of its own.
    Image.MAX_IMAGE_PIXELS //= 2
    Image.ID[:] = ['PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF']
  batch = min(given.batch, given.queue)
  bundle, timings = _loaded(runtime, given, batch)
  listening = _listen(given.host, given.port)
  try:  # Not before: where a service runs already, its port is taken, and its watch would lose the state.
    watch = _watch(runtime, bundle, given)
  except UserError:
    listening.close()
    raise
  scheduler = Scheduler(runtime, bundle, timings, given.queue, batch, watch=watch, safe=given.on_drift == 'safe')
  if watch and watch.alarm:
    scheduler.on_alarm()
  uploads = Uploads(given.max_bytes, given.queue)
  scaling = getattr(bundle, 'scaling', None)  # The run.py of older bundles knows one way only.
  decoders = Decoders(runtime, bundle.image_shape, given.max_pixels, given.max_decoding, scaling)
  max_wait = given.max_wait_ms / 1e3 if given.max_wait_ms else max(MAX_WAIT, 2 * timings.all_stages(batch))
  predictor = Predictor(bundle, timings, scheduler, uploads, decoders, max_wait)
  app = make_app(predictor, scheduler, lambda: _report(given, listening, timings.alone()), given.cors)
  config = uvicorn.Config(
    app,
    http=Protocol,
    loop='asyncio',  # uvloop accepts one connection a turn, so that under load new ones wait for seconds.
    ws='none',
    proxy_headers=False,
    log_level='error',
    access_log=False,
    timeout_keep_alive=KEEP_ALIVE,
    timeout_graceful_shutdown=LONGEST_STOP,
  )
  gc.freeze()  # What lives as long as the service is not looked at again.
  server = Server(config)
  for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again once it has stopped.
    signal.signal(number, lambda *_: setattr(server, 'should_exit', True))
  server.run(sockets=[listening])


def _loaded(runtime: ModuleType, given: argparse.Namespace, batch: int) -> tuple[Any, Any]:
  """The bundle, with the threads that were asked for or else suit its speed, and its measured `Timings`."""
  cores = os.cpu_count() or 1
  bundle, timings = _measured(runtime, given, batch, cores if given.threads is None else given.threads)
  if given.threads is None and cores > 1 and timings.all_stages(batch) < _FAST * batch:
    del bundle  # Its weights: memory for two may be missing.
    bundle, timings = _measured(runtime, given, batch, cores - 1)
  return bundle, timings


def _measured(runtime: ModuleType, given: argparse.Namespace, batch: int, threads: int) -> tuple[Any, Any]:
  from batching import measure

  try:
    bundle = runtime.load(given.bundle, given.provider, threads)
  except runtime.BundleError as error:
    raise UserError(str(error)) from error
  try:
    return bundle, measure(bundle, batch)
  except Exception as error:  # Each runtime raises its own exception when memory is short.
    reason = str(error) or type(error).__name__
    raise UserError(f'stages cannot be run on {batch:,} images at once ({reason}); set --batch') from error


def _watch(runtime: ModuleType, bundle: Any, given: argparse.Namespace) -> Any:
  """The watch that the flags ask for; None: none."""
  if given.watch is None:
    return None
  if not hasattr(runtime, 'Watch'):
    raise UserError(f'expected a run.py with a watch in {given.bundle}, found an older one; export the run again')
  try:
    return runtime.Watch(bundle, given.watch, 0.01 if given.alpha is None else given.alpha)
  except runtime.BundleError as error:
    raise UserError(str(error)) from error


def _load_runtime(folder: Path) -> ModuleType:
  """The bundle's run.py as a module.

  Raises:
    UserError: it does not exist, or cannot be imported.
  """
  path = folder / 'run.py'
  if not os.path.isfile(path):  # Unlike Path.is_file, also False where the name is too long or the folder is private.
    raise UserError(f'expected a bundle with a run.py in {folder}, found none; set --bundle')
  spec = importlib.util.spec_from_file_location('bundle_run', path)
  runtime = sys.modules['bundle_run'] = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(runtime)
  except Exception as error:
    raise UserError(f'{path} cannot be imported ({error}); copy or export the bundle again') from error
  return runtime


def _listen(host: str, port: int) -> socket.socket:
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except OSError as error:
    reason = str(error.strerror).partition(' (while')[0]
    raise UserError(f'cannot listen on {host} port {port} ({reason}); set --host or --port') from error


def _report(given: argparse.Namespace, listening: socket.socket, alone: dict[int, float]) -> None:
  host, port = listening.getsockname()[:2]
  host = f'[{host}]' if ':' in host else host
  exits = ', '.join(f'{1e3 * seconds:.2f}' for seconds in alone.values())
  bundle = _printable(str(given.bundle))
  print(f'serving {bundle} at http://{host}:{port}/predict; its exits take {exits} ms an image', flush=True)


if __name__ == '__main__':
  sys.exit(main())
