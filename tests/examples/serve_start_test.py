"""Tests of a service that cannot start: one line, and exit code 2."""

import argparse
import copy
import io
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import batching
import connections
import decoding
import pytest
import serve
import tiny_bundle
import uploads
from PIL import Image
from serving import EXAMPLES

from paranet_jax.portable import run as run_file

WHOLE = '--bundle=whole'
BUNDLE_OF_0_1_0 = Path(__file__).resolve().parents[1] / 'fixtures/v0_1_0/bundle'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Bundles; all but `whole` are damaged."""
  folder = tmp_path_factory.mktemp('bundles')
  whole = tiny_bundle.write(folder / 'whole')
  for name, change in CHANGED.items():
    shutil.copytree(whole, folder / name)
    change(folder / name)
  return folder


CHANGED = {
  'older': lambda bundle: (bundle / 'bundle.json').write_text('{"schema_version": 0}'),
  'damaged': lambda bundle: (bundle / 'stage_2.onnx').write_bytes(b'damaged'),
  'bare': lambda bundle: (bundle / 'run.py').unlink(),
  'unwatched': lambda bundle: (bundle / 'run.py').write_text((bundle / 'run.py').read_text() + '\ndel Watch\n'),
  'mistyped': lambda bundle: (bundle / 'run.py').write_text('import numpy_for_paranet\n'),
}


def refusal(capsys, *arguments):
  """The one-line error for these arguments."""
  assert serve.main(list(map(str, arguments))) == 2
  out, err = capsys.readouterr()
  assert out == '' and err.startswith('error: ') and err.count('\n') == 1 and err.endswith('\n')
  return err[len('error: ') : -1]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((), 'the following arguments are required: --bundle; see --help'),
    (('--bundle=none',), 'expected a bundle with a run.py in none, found none; set --bundle'),
    ((f'--bundle={"a" * 300}',), f'expected a bundle with a run.py in {"a" * 300}, found none; set --bundle'),
    (('--bundle=bare',), 'expected a bundle with a run.py in bare, found none; set --bundle'),
    (
      ('--bundle=mistyped',),
      "mistyped/run.py cannot be imported (No module named 'numpy_for_paranet'); copy or export the bundle again",
    ),
    (('--bundle=older',), 'expected older/bundle.json of schema_version 1, found 0; use the run.py of that bundle'),
    (
      (WHOLE, '--watch=state.json', '--port=0'),
      'expected what calibration saw in exits.json, found none; calibrate the bundle on images of yours (python -m '
      'paranet_jax.calibrate --bundle=DIR --images=FOLDER), or calibrate and export the run again, in float32',
    ),
    (
      ('--bundle=unwatched', '--watch=state.json', '--port=0'),
      'expected a run.py with a watch in unwatched, found an older one; export the run again',
    ),
    (
      (WHOLE, '--on-drift=safe'),
      '--alpha and --on-drift belong to --watch, found none; set --watch, or leave them out',
    ),
    ((WHOLE, '--provider=gpu'), "unknown provider 'gpu', expected one of cpu, openvino; set --provider"),
    ((WHOLE, '--threads=-1'), 'expected 0 threads or more, found -1; set --threads'),
    ((WHOLE, '--threads=5'), 'expected 4 threads at most, one per core, found 5; set --threads'),
    ((WHOLE, '--port=65536'), 'argument --port: expected a port from 0 to 65535, found 65536; see --help'),
    ((WHOLE, '--port=http'), 'argument --port: expected a port from 0 to 65535, found http; see --help'),
    (
      (WHOLE, '--queue=0'),
      "argument --queue: expected an integer of 1 or more, such as 64 or 10M, found '0'; see --help",
    ),
    (
      (WHOLE, '--max-bytes=M'),
      "argument --max-bytes: expected an integer of 1 or more, such as 64 or 10M, found 'M'; see --help",
    ),
    (
      (WHOLE, '--cors=example.com'),
      "argument --cors: expected an origin such as https://example.com:8443, or *, found 'example.com'; see --help",
    ),
    ((WHOLE, '--quue=5'), 'unrecognized arguments: --quue=5; see --help'),
    *(
      (
        (WHOLE, f'--host={host}'),
        f'argument --host: expected an address such as 127.0.0.1, or 0.0.0.0 for all, found {host!r}; see --help',
      )
      for host in ('', 'é' * 80)
    ),
    (
      (WHOLE, '--host=192.0.2.1'),
      'cannot listen on 192.0.2.1 port 8000 (Cannot assign requested address); set --host or --port',
    ),
  ],
)
def test_refused(folder, monkeypatch, capsys, arguments, message):
  monkeypatch.chdir(folder)
  monkeypatch.setattr(os, 'cpu_count', lambda: 4)
  assert refusal(capsys, *arguments) == message


def test_a_damaged_stage(folder, monkeypatch, capsys):
  monkeypatch.chdir(folder)
  found = refusal(capsys, '--bundle=damaged')
  assert found.startswith('damaged/stage_2.onnx is not what was exported: expected sha256 ')
  assert found.endswith('; copy or export the bundle again')


def test_a_bundle_in_a_folder_whose_name_is_no_text(capsys):
  given = argparse.Namespace(bundle=Path(os.fsdecode(b'caf\xe9')))
  with socket.create_server(('127.0.0.1', 0)) as listening:
    serve._report(given, listening, {1: 0.001})
    port = listening.getsockname()[1]
  line = f'serving caf\\udce9 at http://127.0.0.1:{port}/predict; its exits take 1.00 ms an image\n'
  assert capsys.readouterr().out == line


@pytest.mark.parametrize('flags', [(), ('--watch=state.json',)])
def test_a_port_that_is_taken(folder, capsys, flags):
  """As by a service that runs: nothing is done to the state of its watch before."""
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    assert refusal(capsys, f'--bundle={folder / "whole"}', f'--port={port}', *flags) == (
      f'cannot listen on 127.0.0.1 port {port} (Address already in use); set --host or --port'
    )


@pytest.mark.parametrize(
  ('cores', 'flags', 'milliseconds', 'loaded'),
  [
    (4, [], 31, [4, 3]),  # Of a batch of 64: HTTP and decoding take as long.
    (4, [], 33, [4]),  # A slow bundle is loaded and measured once.
    (1, [], 31, [1]),
    (None, [], 31, [1]),
    (4, ['--threads=1'], 31, [1]),
    (4, ['--threads=0'], 31, [0]),
  ],
)
def test_fast_stages_leave_a_core_to_http(monkeypatch, cores, flags, milliseconds, loaded):
  found = []
  runtime = SimpleNamespace(
    load=lambda folder, provider, threads: found.append(threads) or threads, BundleError=OSError
  )
  monkeypatch.setattr(serve.os, 'cpu_count', lambda: cores)
  one, full = {1: 0.0001, 2: 0.0002}, {1: 0.010, 2: milliseconds / 1e3 - 0.010}
  monkeypatch.setattr(batching, 'measure', lambda bundle, batch: batching.Timings(one, full, batch))
  bundle, timings = serve._loaded(runtime, serve._parse([WHOLE, *flags]), 64)
  assert (found, bundle) == (loaded, loaded[-1])
  assert timings.all_stages(64) == pytest.approx(milliseconds / 1e3)


@pytest.mark.parametrize(
  ('error', 'reason'),
  [
    (MemoryError('Unable to allocate\n7 GiB'), 'Unable to allocate 7 GiB'),
    (MemoryError(), 'MemoryError'),
    (RuntimeError('Failed to allocate memory'), 'Failed to allocate memory'),
  ],
)
def test_a_batch_that_does_not_fit_in_memory(folder, monkeypatch, capsys, error, reason):
  def measure(bundle, batch):
    raise error

  monkeypatch.setattr(batching, 'measure', measure)
  assert refusal(capsys, f'--bundle={folder / "whole"}', '--port=0', '--queue=2K', '--batch=1K') == (
    f'stages cannot be run on 1,000 images at once ({reason}); set --batch'
  )


@pytest.mark.parametrize('name', ['uvicorn', 'onnxruntime', 'python_multipart'])
def test_what_is_not_installed(folder, monkeypatch, capsys, name):
  monkeypatch.setitem(sys.modules, name, None)
  assert refusal(capsys, f'--bundle={folder / "whole"}') == (
    f'expected {name} to serve, found none; pip install -r {EXAMPLES / "requirements.txt"}'
  )


def test_a_signal_just_before_it_serves(folder, monkeypatch):
  asked = []

  def run(server, sockets):
    signal.raise_signal(signal.SIGTERM)
    asked.append(server.should_exit)
    sockets[0].close()

  monkeypatch.setattr(connections.Server, 'run', run)
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    assert serve.main([f'--bundle={folder / "whole"}', '--port=0']) == 0
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  assert asked == [True]


@pytest.mark.parametrize(
  'side, message',
  [
    (31, None),
    (32, 'expected at most 1,000 pixels, found 32 x 32; send a smaller image'),
    (45, 'expected at most 1,000 pixels, found many more; send a smaller image'),
  ],
)
def test_pillow_refuses_no_image_that_the_service_takes(folder, monkeypatch, side, message):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)  # Alone, Pillow would refuse more than 200.
  encoded, found = io.BytesIO(), []
  Image.new('RGB', (side, side)).save(encoded, 'png')

  def run(server, sockets):
    sockets[0].close()
    try:
      found.append(decoding.decode(run_file, encoded.getvalue(), (8, 8, 3), 1000).shape)
    except uploads.Refused as refused:
      found.append(refused.reason)

  monkeypatch.setattr(connections.Server, 'run', run)
  monkeypatch.setattr(signal, 'signal', lambda *_: None)
  assert serve.main([f'--bundle={folder / "whole"}', '--port=0', '--max-pixels=1K']) == 0
  assert found == [message or (8, 8, 3)]


def test_a_bundle_of_0_1_0_is_decoded_within_pillows_limits(monkeypatch):
  found = []

  def run(server, sockets):
    sockets[0].close()
    for side, format in ((31, 'PNG'), (32, 'PNG'), (9, 'TGA')):
      encoded = io.BytesIO()
      Image.new('RGB', (side, side)).save(encoded, format)
      try:
        found.append(decoding.decode(sys.modules['bundle_run'], encoded.getvalue(), (8, 8, 3), 1000).shape)
      except uploads.Refused as refused:
        found.append((refused.status, refused.reason))

  for name in ('MAX_IMAGE_PIXELS', 'ID'):
    monkeypatch.setattr(Image, name, copy.copy(getattr(Image, name)))
  monkeypatch.setattr(connections.Server, 'run', run)
  monkeypatch.setattr(signal, 'signal', lambda *_: None)
  assert serve.main([f'--bundle={BUNDLE_OF_0_1_0}', '--port=0', '--max-pixels=1K']) == 0
  too_many = 'expected at most 1,000 pixels, found more; send a smaller image'
  assert found == [(8, 8, 3), (413, too_many), (400, 'not an image in a known format')]


def test_interrupted_before_it_serves(folder, monkeypatch, capsys):
  def interrupt(_):
    raise KeyboardInterrupt

  monkeypatch.setattr(serve, '_load_runtime', interrupt)
  assert serve.main([f'--bundle={folder / "whole"}']) == 130
  assert capsys.readouterr() == ('', 'stopped at once\n')


@pytest.mark.parametrize(
  ('text', 'count'), [('1', 1), ('64', 64), ('10k', 10_000), ('25M', 25_000_000), ('2G', 2 * 10**9)]
)
def test_counts(text, count):
  assert serve._count(text) == count


ORIGINS = {
  'https://example.com': 'https://example.com',
  'HTTPS://Example.com': 'https://example.com',
  'https://example.com:443': 'https://example.com',
  'http://localhost:80': 'http://localhost',
  'http://example.com:443': 'http://example.com:443',
  'https://example.com:08443': 'https://example.com:8443',
  'http://[::1]:5173': 'http://[::1]:5173',
  'https://xn--mnchen-3ya.de': 'https://xn--mnchen-3ya.de',
  '*': '*',
}
NO_ORIGINS = (
  *('https://example.com/', 'https://*.example.com', 'https://', 'https://a.com,https://b.com', 'null', ''),
  *('https://m\u00fcnchen.de', 'https://example.com:99999', 'https://example.com:', 'https://me@example.com'),
)


@pytest.mark.parametrize('text', [*ORIGINS, *NO_ORIGINS])
def test_origins_are_those_that_browsers_send(text):
  if text in ORIGINS:
    assert serve._origin(text) == ORIGINS[text]
    return
  with pytest.raises(argparse.ArgumentTypeError, match='expected an origin such as https://example.com:8443, or'):
    serve._origin(text)
