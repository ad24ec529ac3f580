"""Tests of the service as a user starts it, without JAX or this package: no request is lost or mixed up."""

import http.client
import json
import queue
import re
import signal
import socket
import threading
import warnings
from collections import Counter
from typing import Any, NamedTuple

import odd_images
import pytest
import tiny_bundle
from serving import PNG, Server, encoded, form, of_pixels, wait_until

from paranet_jax.portable import run

MAX_BYTES, QUEUE = 50_000, 64
NO_IMAGE = 'not an image in a known format (PNG, JPEG, GIF, BMP, PPM, WEBP, TIFF)'
NONE_SENT = 'expected an image, found none; send one as the body, or several as files of a form'
TOO_LARGE = 'expected at most 50,000 bytes, found more; send fewer or smaller images'
SEVERAL = 'expected one of budget_ms and deadline_ms, once, found several; leave out all but one'


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  folder = tmp_path_factory.mktemp('served')
  server = Server(folder, tiny_bundle.write(folder / 'bundle'), f'--max-bytes={MAX_BYTES}', f'--queue={QUEUE}')
  yield server
  server.stop(signal.SIGINT)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
  return run.load(tiny_bundle.write(tmp_path_factory.mktemp('bundle') / 'bundle'), threads=1)


def matches(found: dict[str, Any], expected: run.Prediction | str) -> bool:
  """Whether this answers the image as expected, with a prediction or a reason."""
  if isinstance(expected, str):
    return found == {'error': expected}
  label = expected.label
  assert list(found) == ['label', 'class_name', 'probability', 'exit', 'milliseconds'] and found['milliseconds'] > 0
  same = (found['label'], found['class_name'], found['exit']) == (label, f'class {label}', expected.exit)
  return same and abs(found['probability'] - expected.probabilities[label]) < 1e-5


class Job(NamedTuple):
  """A request, and its expected answers or reasons by image; for a request without images, one reason."""

  path: str
  body: Any
  headers: dict[str, str]
  status: int
  expected: Any


def jobs(bundle: run.Adaptive) -> list[Job]:
  """Hundreds of requests with different images."""
  many_pixels = of_pixels(6000, 5000)
  too_many = 'expected at most 25,000,000 pixels, found 6000 x 5000; send a smaller image'

  def decoded(image):
    return run.decode_image(image, tiny_bundle.SIDE, tiny_bundle.CHANNELS)

  def one(image, query='', answer=bundle.predict_one):
    return Job(f'/predict{query}', image, {}, 200, [answer(decoded(image))])

  def several(*images, fields=(), answer=bundle.predict_one):
    expected = [image[1] if isinstance(image, tuple) else answer(decoded(image)) for image in images]
    body, headers = form([image[0] if isinstance(image, tuple) else image for image in images], fields)
    return Job('/predict', body, headers, 200, expected)

  def first_exit(image):
    return next(bundle.anytime(image))

  found = []
  for seed in range(0, 300, 10):
    image = encoded(seed)
    broken = b'no image', NO_IMAGE
    found += [
      one(image),
      one(encoded(seed + 1, 'JPEG', (20, 13))),
      one(encoded(seed + 2, 'WEBP', (9, 30)), '?deadline_ms=60000'),
      one(encoded(seed + 3, 'TIFF'), '?budget_ms=60000'),
      one(encoded(seed + 4, 'GIF'), '?deadline_ms=1e-6', first_exit),
      several(encoded(seed + 5), encoded(seed + 6), broken, encoded(seed + 7), fields=[('deadline_ms', '60000')]),
      several(encoded(seed + 8), encoded(seed + 9, 'BMP'), fields=[('deadline_ms', '1e-6')], answer=first_exit),
      several((many_pixels, too_many), image, broken),
      Job('/predict', b'no image', {}, 400, [NO_IMAGE]),
      Job('/predict', many_pixels, {}, 413, [too_many]),
      Job('/predict', b'0' * (MAX_BYTES + 1), {}, 413, TOO_LARGE),
      Job('/predict', iter([b'0' * 8192] * 8), {}, 413, TOO_LARGE),
    ]
  return found


def test_hundreds_of_concurrent_requests(server, bundle):
  before = server.metrics()
  todo, replies = queue.SimpleQueue(), queue.SimpleQueue()
  all_jobs = jobs(bundle)
  for job in all_jobs:
    todo.put(job)

  def client():
    connection = server.connect()
    while not todo.empty():
      try:
        job = todo.get_nowait()
      except queue.Empty:
        break
      while (reply := server.ask('POST', *job[:3], over=connection)).status == 503:
        assert reply.headers['retry-after'] == '1'
      replies.put((job, reply))
    connection.close()

  threads = [threading.Thread(target=client) for _ in range(12)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()

  exits, statuses = Counter(), Counter()
  for _ in all_jobs:
    job, reply = replies.get_nowait()
    statuses[str(reply.status)] += 1
    assert reply.status == job.status, (job, reply)
    if isinstance(job.expected, str):
      assert reply.body == {'error': job.expected}
      continue
    assert len(reply.body['answers']) == len(job.expected)
    assert all(map(matches, reply.body['answers'], job.expected)), (job.expected, reply.body)
    assert reply.body.get('error') == (job.expected[0] if job.status != 200 else None)
    exits.update(str(answer['exit']) for answer in reply.body['answers'] if 'exit' in answer)
  assert replies.empty()
  assert statuses == {'200': 240, '400': 30, '413': 90}
  assert sum(exits.values()) == 30 * (5 + 3 + 2 + 1) and len(exits) == 3

  after = server.metrics()
  grown = {name: value - before.get(name, 0) for name, value in after.items()}
  for status, count in statuses.items():
    assert grown[f'paranet_requests_total{{status="{status}"}}'] == count
  for number, count in exits.items():
    assert grown[f'paranet_images_total{{exit="{number}"}}'] == count
    through = sum(images for other, images in exits.items() if other >= number)
    assert grown[f'paranet_stage_batch_images_sum{{exit="{number}"}}'] == through
    runs = grown[f'paranet_stage_batch_images_count{{exit="{number}"}}']
    assert 0 < runs == grown[f'paranet_stage_seconds_count{{exit="{number}"}}'] <= through
    assert grown[f'paranet_stage_seconds_sum{{exit="{number}"}}'] > 0
  assert grown['paranet_image_seconds_count'] == sum(exits.values()) and grown['paranet_image_seconds_sum'] > 0
  assert after['paranet_queue_images'] == 0


@pytest.mark.parametrize('name', odd_images.all_files())
def test_odd_images_are_answered_as_by_run(server, bundle, name):
  image = odd_images.all_files()[name]
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Pillow warns about damaged metadata.
    expected = bundle.predict_one(run.decode_image(image, tiny_bundle.SIDE, tiny_bundle.CHANNELS))
  (answer,) = server.ask('POST', '/predict', image).body['answers']
  assert matches(answer, expected)


REFUSED = {
  'nothing': ('/predict', b'', {}, 400, NONE_SENT),
  'a form without files': ('/predict', *form([], [('budget_ms', '5')]), 400, NONE_SENT),
  'no image': ('/predict', b'%!PS-Adobe-3.0 EPSF-3.0\n', {}, 400, NO_IMAGE),
  'another image format': ('/predict', b'\0\0\x01\0\x01\0\x01\x01', {}, 400, NO_IMAGE),
  'half an image': ('/predict', encoded(0, size=(50, 50))[:4000], {}, 400, 'image file is truncated'),
  'another field': (
    '/predict?budgetms=5', PNG, {}, 400, "unknown field 'budgetms', expected budget_ms or deadline_ms"
  ),
  'another field of the form': (
    '/predict', *form([PNG], [('top', '5')]), 400, "unknown field 'top', expected budget_ms or deadline_ms"
  ),
  'no number': (
    '/predict?budget_ms=soon', PNG, {}, 400, "expected budget_ms in milliseconds, above 0, found 'soon'"
  ),
  'zero': ('/predict?budget_ms=0', PNG, {}, 400, "expected budget_ms in milliseconds, above 0, found '0'"),
  'negative': (
    '/predict', *form([PNG], [('deadline_ms', '-1')]), 400,
    "expected deadline_ms in milliseconds, above 0, found '-1'",
  ),
  'not finite': (
    '/predict?deadline_ms=inf', PNG, {}, 400, "expected deadline_ms in milliseconds, above 0, found 'inf'"
  ),
  'both': ('/predict?deadline_ms=5&budget_ms=5', PNG, {}, 400, SEVERAL),
  'twice': ('/predict?deadline_ms=5', *form([PNG], [('deadline_ms', '5')]), 400, SEVERAL),
  'less than an exit': (
    '/predict?budget_ms=1e-7', PNG, {}, 400,
    r're:expected a budget_ms of \d\.\d\d or more, as the first exit takes, found 1e-07',
  ),
  'a form that was cut': (
    '/predict', *form([PNG, PNG], end=''), 400,
    'expected a whole form, found no boundary that closes it; send it again',
  ),
  'a form without a boundary': (
    '/predict', b'x', {'Content-Type': 'multipart/form-data'}, 400, 'Missing boundary in multipart.'
  ),
  'more files than the queue': (
    '/predict', *form([b''] * (QUEUE + 1)), 400, 'Too many files. Maximum number of files is 64.'
  ),
  'a long field': (
    '/predict', *form([PNG], [('budget_ms', '5' * 2000)]), 400, 'Part exceeded maximum size of 1KB.'
  ),
  'many bytes': ('/predict', b'0' * (MAX_BYTES + 1), {}, 413, TOO_LARGE),
  'many bytes, without a length': ('/predict', [b'0' * MAX_BYTES, b'0'], {}, 413, TOO_LARGE),
  'many bytes of a form': ('/predict', *form([b'0' * MAX_BYTES]), 413, TOO_LARGE),
  'many pixels': (
    '/predict', of_pixels(5001, 5000), {}, 413,
    'expected at most 25,000,000 pixels, found 5001 x 5000; send a smaller image',
  ),
  'more pixels than Pillow opens': (
    '/predict', of_pixels(18_000, 10_000), {}, 413,
    'expected at most 25,000,000 pixels, found many more; send a smaller image',
  ),
  'another path': ('/', PNG, {}, 404, 'Not Found'),
  'another method': ('/metrics', PNG, {}, 405, 'Method Not Allowed'),
}  # fmt: skip


def part(content: bytes, head: str = 'Content-Disposition: form-data; name="image"; filename="x"') -> bytes:
  return f'--border\r\n{head}\r\n\r\n'.encode() + content + b'\r\n'


AS_FORM = {'Content-Type': 'multipart/form-data; boundary=border'}
NO_NAME = 'The Content-Disposition header field "name" must be provided.'
NO_FILE = 'expected a file as image, found text; send it with a filename, as curl -F image=@FILE does'
NESTED = b'--inner\r\n\r\n' + PNG + b'\r\n--inner--'
ODD_FORMS = {
  'no filename': ([part(PNG, 'Content-Disposition: form-data; name="image"')], AS_FORM, 400, NO_FILE),
  'an empty filename': (
    [part(PNG, 'Content-Disposition: form-data; name="image"; filename=""')], AS_FORM, 200, None
  ),
  'a filename not of UTF-8': (
    [part(PNG).replace(b'="x"', b'="\xff"')], AS_FORM, 200, None
  ),
  'an empty file': ([part(b'')], AS_FORM, 400, 'expected an image, found an empty file'),
  'an empty file and an image': ([part(b''), part(PNG)], AS_FORM, 200, None),
  'no name': ([part(PNG, 'Content-Disposition: form-data; filename="x"')], AS_FORM, 400, NO_NAME),
  'no headers': ([b'--border\r\n\r\n' + PNG + b'\r\n'], AS_FORM, 400, NO_NAME),
  'a damaged header': ([part(PNG, 'nothing')], AS_FORM, 400, 'Invalid multipart data.'),
  'long headers': ([part(PNG, f'X: {"a" * 20_000}')], AS_FORM, 400, 'Invalid multipart data.'),
  'another boundary': (
    [part(PNG)], {'Content-Type': 'multipart/form-data; boundary=other'}, 400, 'Invalid multipart data.'
  ),
  'no boundary': (
    [part(PNG)], {'Content-Type': 'multipart/form-data; boundary='}, 400, 'Invalid multipart data.'
  ),
  'a form in a form': (
    [part(NESTED, 'Content-Disposition: form-data; name="image"\r\nContent-Type: multipart/mixed; boundary=inner')],
    AS_FORM, 400, NO_FILE,
  ),
  'a form as a file': ([part(NESTED)], AS_FORM, 400, NO_IMAGE),
  'a field twice': (
    [part(b'5', 'Content-Disposition: form-data; name="budget_ms"')] * 2 + [part(PNG)], AS_FORM, 400, SEVERAL
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', ODD_FORMS)
def test_odd_forms(server, name):
  parts, headers, status, reason = ODD_FORMS[name]
  reply = server.ask('POST', '/predict', b''.join(parts) + b'--border--\r\n', headers)
  assert (reply.status, reply.body.get('error')) == (status, reason)


MALFORMED = 'expected an HTTP/1.1 request, found a malformed one ('
START = b'POST /predict HTTP/1.1\r\nHost: x\r\n'
RAW = {
  'a negative length': (START + b'Content-Length: -5\r\n\r\n', 400, f'{MALFORMED}Invalid character in '),
  'two lengths': (
    START + b'Content-Length: 5\r\nContent-Length: 6\r\n\r\n',
    400,
    f'{MALFORMED}Duplicate Content-',
  ),
  'a damaged chunk': (
    START + b'Transfer-Encoding: chunked\r\n\r\nzz\r\n',
    400,
    f'{MALFORMED}Invalid character in chunk',
  ),
  'another coding': (
    START + b'Transfer-Encoding: gzip\r\n\r\n',
    501,
    f'{MALFORMED}Request has invalid `Transfer',
  ),
  'a length and chunks': (
    START + b'Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n',
    400,
    f"{MALFORMED}Content-Length can't be ",
  ),
  'no path': (b'CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n', 400, MALFORMED),
  'no host': (b'POST /predict HTTP/1.1\r\n\r\n', 400, f'{MALFORMED}Missing mandatory Host: header)'),
  'TLS': (b'\x16\x03\x01\x02\x00\x01\x00\r\n\r\n', 400, f'{MALFORMED}Invalid method encountered)'),
  'a header without end': (START + b'X: ' + b'a' * 300_000, 431, f'{MALFORMED}Receive buffer too long)'),
  'no length': (START + b'\r\n', 400, NONE_SENT),
}


@pytest.mark.parametrize('name', RAW)
def test_what_is_not_http(server, name):
  request, status, reason = RAW[name]
  with socket.create_connection(('127.0.0.1', server.port), timeout=60) as client:
    client.sendall(request)
    reply = http.client.HTTPResponse(client)
    reply.begin()
    assert reply.status == status
    (line,) = json.loads(reply.read()).items()
  assert line[0] == 'error' and line[1].startswith(reason)


def test_chunks(server):
  assert server.ask('POST', '/predict', iter([PNG[:20], PNG[20:]])).status == 200


@pytest.mark.parametrize('name', REFUSED)
def test_refused(server, name):
  path, body, headers, status, reason = REFUSED[name]
  reply = server.ask('POST', path, body, headers)
  assert reply.status == status
  if reason.startswith('re:'):
    assert re.fullmatch(reason[3:], reply.body['error'])
  else:
    assert reply.body['error'].startswith(reason)
  assert set(reply.body) <= {'error', 'answers'}


def test_as_many_bytes_as_allowed_are_taken(server):
  assert server.ask('POST', '/predict', PNG + b'0' * (MAX_BYTES - len(PNG))).status == 200


def test_a_large_content_length_is_rejected_at_once(server):
  with socket.create_connection(('127.0.0.1', server.port), timeout=60) as client:
    client.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50001\r\n\r\n')
    assert client.recv(12) == b'HTTP/1.1 413'


def test_a_client_that_disconnects(server):
  def disconnected():
    return server.metrics().get('paranet_requests_total{status="499"}', 0)

  before = disconnected()
  with socket.create_connection(('127.0.0.1', server.port)) as client:
    client.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n' + PNG[:10])
  wait_until(lambda: disconnected() == before + 1)
  assert server.ask('POST', '/predict', PNG).status == 200


def test_the_api_lists_its_inputs(server):
  predict = server.ask('GET', '/openapi.json').body['paths']['/predict']['post']
  assert [field['name'] for field in predict['parameters']] == ['budget_ms', 'deadline_ms']
  assert list(predict['requestBody']['content']) == ['image/*', 'multipart/form-data']


def together(count: int, client: Any) -> list[threading.Thread]:
  threads = [threading.Thread(target=client, args=(index,)) for index in range(count)]
  for thread in threads:
    thread.start()
  return threads


def test_overload_limits_and_a_stop_while_images_are_queued(tmp_path):
  bundle = tiny_bundle.write(tmp_path / 'bundle', probability=1, work=384)  # Slow, and no image exits early.
  server, reference = Server(tmp_path, bundle, '--queue=12', '--batch=4'), run.load(bundle, threads=1)

  body, headers = form([PNG] * 4)
  replies = []

  def several(_):
    for _ in range(3):
      replies.append(server.ask('POST', '/predict', body, headers))

  for thread in together(6, several):
    thread.join()
  statuses = Counter(str(reply.status) for reply in replies)
  assert sum(statuses.values()) == 18 and set(statuses) == {'200', '503'}
  for reply in replies:
    if reply.status == 503:
      assert reply.body == {'error': 'no room for 4 images now; try again'} and reply.headers['retry-after'] == '1'
    else:
      assert [answer['exit'] for answer in reply.body['answers']] == [3] * 4
  metrics = server.metrics()
  assert {status: metrics[f'paranet_requests_total{{status="{status}"}}'] for status in statuses} == statuses
  assert metrics['paranet_images_total{exit="3"}'] == 4 * statuses['200'] and metrics['paranet_queue_images'] == 0

  for number in (1, 2):  # Between what two exits take, as the first line said.
    budget = (server.exit_ms[number - 1] + server.exit_ms[number]) / 2
    (answer,) = server.ask('POST', f'/predict?budget_ms={budget}', PNG).body['answers']
    assert answer['exit'] == number
  for deadline, exits in ((server.exit_ms[2] - server.exit_ms[1], (1, 2)), (60_000, (3,))):
    (answer,) = server.ask('POST', f'/predict?deadline_ms={deadline}', PNG).body['answers']
    assert answer['exit'] in exits  # The first deadline is as long as the last stage alone.

  images = [[encoded(4 * request + row) for row in range(4)] for request in range(3)]
  replies = {}
  before = server.metrics()['paranet_images_total{exit="3"}']

  def all_taken():
    metrics = server.metrics()
    return metrics['paranet_queue_images'] + metrics['paranet_images_total{exit="3"}'] == 12 + before

  threads = together(
    3, lambda request: replies.update({request: server.ask('POST', '/predict', *form(images[request]))})
  )
  wait_until(all_taken)
  assert len(replies) < 3  # Some are still queued.
  server.stop()
  for thread in threads:
    thread.join()
  assert len(replies) == 3
  for request, reply in replies.items():
    assert reply.status == 200
    expected = [reference.predict_one(run.decode_image(image, 8, 3)) for image in images[request]]
    assert all(map(matches, reply.body['answers'], expected))
  with pytest.raises(ConnectionRefusedError):
    server.ask('GET', '/healthz')
