"""Tests of the service's own failures; they call the application without a server."""

import asyncio
import json
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_bundle
from application import MAX_BYTES, Service
from fastapi import Request
from labels import Remembered
from service import Answers, make_app
from serving import PNG, encoded, form, of_pixels
from uploads import Refused, Uploads

from paranet_jax.portable import run


@pytest.fixture
def bundle(tmp_path):
  return run.load(tiny_bundle.write(tmp_path / 'bundle'), threads=1)


@pytest.fixture
def service(bundle):
  service = Service(bundle)
  service.scheduler.start()
  yield service
  service.scheduler.close()


def test_the_thread_lives_as_long_as_the_application(bundle):
  service, alive = Service(bundle), []
  app = make_app(service.predictor, service.scheduler, lambda: alive.append(service.scheduler.alive()))

  async def live():
    async with app.router.lifespan_context(app):
      assert alive == [True]

  asyncio.run(live())
  assert not service.scheduler.alive()


def test_a_thread_that_has_ended_is_reported(service):
  assert service.ask('GET', '/healthz')[::2] == (200, {'status': 'ok'})
  service.scheduler.close()
  status, headers, body = service.ask('GET', '/healthz')
  assert (status, headers['retry-after'], body) == (503, '1', {'error': 'the thread of the stages has ended'})
  status, headers, body = service.ask('POST', '/predict', PNG)
  assert (status, headers['retry-after'], body) == (503, '1', {'error': 'the service is stopping'})
  assert service.predictor.requests == {503: 1}


def test_a_stage_that_fails(service, bundle, monkeypatch, capsys):
  def failing(number):
    raise ArithmeticError('of this stage')

  with monkeypatch.context() as patch:
    patch.setattr(bundle, 'stage', failing)
    status, _, body = service.ask('POST', '/predict', *form([PNG, PNG]))
  failed = {'error': 'the network failed on this image; see the log of the service'}
  assert (status, body) == (500, failed | {'answers': [failed, failed]})
  assert 'ArithmeticError: of this stage' in capsys.readouterr().err
  assert service.ask('POST', '/predict', PNG)[0] == 200
  assert service.predictor.requests == {500: 1, 200: 1} and service.scheduler.inside == 0


def test_an_answer_that_is_not_finite(service, bundle, monkeypatch):
  answers = bundle.answers

  def diverging(number, logits):
    found = answers(number, logits)
    found.probabilities[:1] = np.nan
    return found

  monkeypatch.setattr(bundle, 'answers', diverging)
  status, _, body = service.ask('POST', '/predict', PNG)
  refused = {'error': "the network's answer is not finite"}
  assert (status, body) == (500, refused | {'answers': [refused]})


def test_a_class_name_that_is_not_utf_8(service, bundle, monkeypatch):
  monkeypatch.setattr(bundle, 'class_names', ('caf\udce9 \x1b[2J',) * tiny_bundle.CLASSES)
  status, _, body = service.ask('POST', '/predict', PNG)
  assert (status, body['answers'][0]['class_name']) == (
    200,
    'caf\\udce9 \x1b[2J',
  )  # JSON escapes what controls a terminal.


def test_an_unexpected_failure(service, monkeypatch):
  def failing(count):
    raise ArithmeticError('of ours')

  monkeypatch.setattr(service.scheduler, 'admit', failing)
  with pytest.raises(ArithmeticError, match='of ours'):  # The server logs it.
    service.ask('POST', '/predict', PNG)
  assert service.predictor.requests == {500: 1}


def test_requests_that_would_wait_too_long_are_refused(service, monkeypatch):
  refused = 'expected a wait of at most {} ms, found {}; try again'
  service.predictor.lag.seconds = 2.1
  status, headers, body = service.ask('POST', '/predict', PNG)
  assert (status, headers['retry-after'], body) == (503, '1', {'error': refused.format(500, 2100)})
  assert service.ask('GET', '/healthz')[0] == 200
  service.predictor.lag.seconds = 0.1
  monkeypatch.setattr(service.scheduler, 'wait', lambda: 0.3)
  monkeypatch.setattr(service.predictor._decoders, 'wait', lambda sizes=(): 0.05)
  assert service.ask('POST', '/predict', PNG)[0] == 200
  assert service.ask('POST', '/predict', *form([PNG], [('deadline_ms', '400')]))[0] == 200
  status, _, body = service.ask('POST', '/predict', *form([PNG], [('deadline_ms', '340')]))
  assert (status, body) == (503, {'error': refused.format(340, 450)})
  monkeypatch.setattr(service.predictor._decoders, 'wait', lambda sizes=(): 0.3 if sizes else 0.0)
  status, _, body = service.ask('POST', '/predict', PNG)
  assert (status, body) == (503, {'error': refused.format(500, 700)})
  assert service.predictor.requests == {503: 3, 200: 2} and service.scheduler.inside == 0


def test_images_that_take_too_much_to_decode_together(service):
  status, _, body = service.ask('POST', '/predict', *form([of_pixels(300, 1000)] * 2))
  assert status == 413 and body['error'].startswith('expected images that take at most 1,000,000 bytes to decode toge')
  assert service.scheduler.inside == 0


def test_long_headers(service):
  status, _, body = service.ask('POST', '/predict', PNG, {'X': 'a' * 17_000})
  assert (status, body) == (431, {'error': 'expected at most 16,384 bytes of headers, found more'})


@pytest.mark.parametrize(
  ('headers', 'found'),
  [
    ({'Content-Encoding': 'gzip'}, 'Content-Encoding: gzip'),
    ({'Content-Type': 'multipart/mixed; boundary=b'}, 'Content-Type: multipart/mixed; boundary=b'),
  ],
)
def test_other_encodings(service, headers, found):
  expected = f'expected an image or a form (multipart/form-data), not compressed, found {found}'
  assert service.ask('POST', '/predict', PNG, headers)[::2] == (415, {'error': expected})


def test_a_charset_that_decodes_nothing(service):
  body, headers = form([PNG])
  headers = {'Content-Type': f'{headers["Content-Type"]}; charset=undefined'}
  expected = 'expected a form in UTF-8, found another charset; leave it out of Content-Type'
  assert service.ask('POST', '/predict', body, headers)[::2] == (400, {'error': expected})
  assert service.predictor._uploads._held == 0


@pytest.mark.parametrize(('declared', 'status'), [('4', 400), ('1001', 413), ('9' * 30, 413)])
def test_a_content_length_after_thousands_of_zeros(service, declared, status):
  headers = {'Content-Length': '0' * 5000 + declared}
  assert service.ask('POST', '/predict', b'half', headers)[0] == status


@pytest.mark.parametrize(
  ('method', 'path', 'status', 'allow'),
  [
    ('HEAD', '/healthz', 200, None),
    ('HEAD', '/metrics', 200, None),
    ('HEAD', '/predict', 405, 'OPTIONS, POST'),
    ('OPTIONS', '/predict', 204, 'OPTIONS, POST'),
    ('OPTIONS', '/healthz', 204, 'GET, HEAD, OPTIONS'),
    ('OPTIONS', '/metrics', 204, 'GET, HEAD, OPTIONS'),
    ('OPTIONS', '/nowhere', 404, None),
    ('PUT', '/metrics', 405, 'GET, HEAD, OPTIONS'),
    ('POST', '/predict/', 404, None),
  ],
)
def test_methods(service, method, path, status, allow):
  found = service.ask(method, path)
  assert (found[0], found[1].get('allow')) == (status, allow)


def test_pages_of_other_sites(bundle):
  origin = {'Origin': 'https://example.com'}
  asked = origin | {'Access-Control-Request-Method': 'POST', 'Access-Control-Request-Headers': 'content-type'}
  for origins, allowed in (((), None), (['https://example.com'], 'https://example.com'), (['*'], '*')):
    service = Service(bundle, origins)
    for method, path, headers in (('GET', '/metrics', origin), ('OPTIONS', '/predict', asked)):
      assert service.ask(method, path, headers=headers)[1].get('access-control-allow-origin') == allowed
    service.predictor.lag.seconds = 9
    status, headers, _ = service.ask('POST', '/predict', PNG, origin)
    assert (status, headers.get('access-control-allow-origin')) == (503, allowed)


def test_a_request_that_does_not_arrive():
  uploads = Uploads(MAX_BYTES, 8, seconds=0.01)
  sent = [{'type': 'http.request', 'body': b'half', 'more_body': True}]

  async def receive():
    return sent.pop() if sent else await asyncio.Future()

  async def read():
    async with uploads.read(Request({'type': 'http', 'headers': [], 'query_string': b''}, receive)):
      pass

  with pytest.raises(Refused, match='^expected the whole request within 0.01 s, found 4 bytes$') as refused:
    asyncio.run(read())
  assert refused.value.status == 408 and uploads._held == 0


_HALF = {'type': 'http.request', 'body': b'half', 'more_body': True}


@pytest.mark.parametrize('path', ['/predict', '/labels'])
@pytest.mark.parametrize(
  ('messages', 'headers', 'status', 'body'),
  [
    ([_HALF], {}, 408, {'error': 'expected the whole request within 0.01 s, found 4 bytes'}),
    ([], {}, 408, {'error': 'expected the whole request within 0.01 s, found 0 bytes'}),
    ([_HALF, {'type': 'http.disconnect'}], {}, 499, b''),
    ([], {'Content-Length': '1001'}, 413, {'error': 'expected at most 1,000 bytes, found more; '}),
    ([_HALF | {'body': b'0' * 600}] * 2, {}, 413, {'error': 'expected at most 1,000 bytes, found more; '}),
  ],
  ids=['stalls', 'never starts', 'disconnects', 'declares too much', 'sends too much'],
)
def test_requests_that_do_not_arrive_whole(service, monkeypatch, path, messages, headers, status, body):
  monkeypatch.setattr(service.scheduler, 'takes_labels', lambda: True)
  uploads = service.predictor._uploads
  uploads._seconds = 0.01
  if status == 413:
    remedy = {'/predict': 'send fewer or smaller images', '/labels': 'send labels in parts'}[path]
    body = {'error': body['error'] + remedy}
  assert service.ask('POST', path, headers=headers, messages=messages)[::2] == (status, body)
  assert uploads._held == 0
  assert service.predictor.requests == ({status: 1} if path == '/predict' else {})


def test_labels_count_as_bytes_in_flight(service, monkeypatch):
  monkeypatch.setattr(service.scheduler, 'takes_labels', lambda: True)
  monkeypatch.setattr(service.predictor._uploads, '_held', 16 * MAX_BYTES - 4)
  assert service.ask('POST', '/labels', b'[ ]')[::2] == (200, {'recorded': 0})
  found = service.ask('POST', '/labels', b'[   ]')[::2]
  assert found == (503, {'error': 'too many bytes are being sent at once; try again'})
  assert service.predictor._uploads._held == 16 * MAX_BYTES - 4


def test_the_watch_sees_images_in_the_order_of_arrival_whichever_is_decoded_first(service, monkeypatch):
  shown, waits = [], []
  service.scheduler.watch = SimpleNamespace(BLOCK=1, alarm=None, add=shown.extend, flush=lambda: None)

  def held_up(work):
    async def late(*arguments):
      waits.append(asyncio.Event())
      await waits[-1].wait()
      return await work(*arguments)

    return late

  decoders = service.predictor._decoders
  for name in ('sizes', 'decode'):
    monkeypatch.setattr(decoders, name, held_up(getattr(decoders, name)))

  async def live():
    async def until_waiting(count):
      while len(waits) < count:
        await asyncio.sleep(0)

    def ask(*images):
      return asyncio.create_task(service.predictor._outcomes(images, {}, time.perf_counter()))

    requests = [ask(PNG, b'no image'), ask(PNG, PNG), ask(*[PNG] * 9)]
    await until_waiting(3)
    second = await ask(encoded(1))  # It is decoded at once.
    assert shown == []
    for wait in waits:
      wait.set()
    await until_waiting(3 + 2 + 2)
    requests[1].cancel()
    third = await ask(encoded(2))
    assert shown == []
    for wait in waits:
      wait.set()
    first, cancelled, refused = await asyncio.gather(*requests, return_exceptions=True)
    assert isinstance(cancelled, asyncio.CancelledError) and refused.status == 503
    return [*first, *second, *third]

  first, damaged, second, third = asyncio.run(asyncio.wait_for(live(), 60))
  assert (first[0], damaged[0]) == (200, 400)
  service.scheduler.close()
  answers = [found for _, found in (first, second, third)]
  assert [(exit, round(most, 6), label) for exit, most, label in shown] == [
    (found['exit'], found['probability'], found['label']) for found in answers
  ]
  assert len({found['probability'] for found in answers}) == 3 and service.scheduler.inside == 0


def test_bytes_in_flight_are_bounded():
  uploads = Uploads(MAX_BYTES, 8)

  def read(size):
    async def receive():
      return {'type': 'http.request', 'body': b'0' * size}

    return uploads.read(Request({'type': 'http', 'headers': [], 'query_string': b''}, receive))

  async def fill():
    held = [read(MAX_BYTES) for _ in range(16)]
    for one in held:
      assert np.size((await one.__aenter__()).images) == 1
    with pytest.raises(Refused, match='too many bytes are being sent at once; try again') as refused:
      async with read(1):
        pass
    assert refused.value.status == 503
    await held[0].__aexit__(None, None, None)
    async with read(MAX_BYTES):
      pass
    for one in held[1:]:
      await one.__aexit__(None, None, None)

  asyncio.run(fill())


def test_drift_is_reported(service, bundle):
  assert not any('drift' in line for line in service.ask('GET', '/metrics')[2].decode().splitlines())
  bundle._seen = {'images': 9, 'edges': [[], [], []], 'counts': [[3], [3], [3]], 'classes': [9, 0, 0, 0, 0], 'wrong': 1}
  service.scheduler.watch = watch = run.Watch(bundle)
  assert service.ask('GET', '/healthz')[::2] == (200, {'status': 'ok'})
  watch.alarm = run.Drift(64, 'answers', {1: 0.5, 2: 0.0, 3: 0.5}, 20.0)
  assert service.ask('GET', '/healthz')[::2] == (200, {'status': 'degraded', 'drift': watch.line()})
  lines = service.ask('GET', '/metrics')[2].decode().splitlines()
  assert {'paranet_drift 1', 'paranet_drift_evidence 1.0', 'paranet_watched_images_total 0'} <= set(lines)


def test_labels_for_images_answered_earlier(service, bundle, monkeypatch):
  """A service that has to learn from its clients how often it is wrong."""

  def label(*entries):
    return service.ask('POST', '/labels', json.dumps(entries[0] if len(entries) == 1 else entries).encode())[::2]

  none = 'expected a watch that tests errors, found none; set --watch, with a bundle of labeled images'
  none += ', or calibrate it again'  # One with --reject that did not count the answered images.
  assert label({'id': 'a', 'label': 0}) == (404, {'error': none})
  assert 'id' not in service.ask('POST', '/predict', PNG)[2]['answers'][0]
  bundle._seen = {'images': 9, 'edges': [[], [], []], 'counts': [[3], [3], [3]], 'classes': [9, 0, 0, 0, 0], 'wrong': 1}
  watch = run.Watch(bundle)
  recorded = []
  monkeypatch.setattr(watch, 'record', lambda right, answer: recorded.append((right, answer.label)))
  service.scheduler.watch = watch
  first, second, third = (service.ask('POST', '/predict', PNG)[2]['answers'][0] for _ in range(3))
  forced = service.ask('POST', '/predict', *form([PNG], [('deadline_ms', '100000')]))[2]['answers'][0]
  assert 'id' not in forced and len({first['id'], second['id'], third['id']}) == 3
  right = (first['label'] + 1) % tiny_bundle.CLASSES
  assert label({'id': first['id'], 'label': right}) == (200, {'recorded': 1})
  again = {'error': f'expected the id of an answer that has no label yet, one of the latest 100,000, found "{first["id"]}"; leave it out'}  # fmt: skip  # noqa: E501
  assert label({'id': second['id'], 'label': 'class 2'}, {'id': first['id'], 'label': 0}) == (404, again)
  twice = f'expected one label for "{third["id"]}", found several; leave out all but one'
  assert label(*[{'id': third['id'], 'label': 0}] * 2) == (400, {'error': twice})
  assert label({'id': second['id'], 'label': 'class 2'}, {'id': third['id'], 'label': 0}) == (200, {'recorded': 2})
  service.scheduler.close()
  assert label({'id': 'a', 'label': 0}) == (503, {'error': 'the service is stopping'})
  assert recorded == [(right, first['label']), (2, second['label']), (0, third['label'])]


@pytest.mark.parametrize(
  ('body', 'status', 'error'),
  [
    (b'{', 400, 'expected JSON, found something else ('),
    (b'[3]', 400, 'expected {"id": "...", "label": ...}, or a list of them, found 3'),
    (b'{"id": "a", "label": 5}', 400, 'expected a label from 0 to 4, or the name of a class, found 5'),
    (b'{"id": "a", "label": "cow"}', 400, 'expected a label from 0 to 4, or the name of a class, found "cow"'),
    (b'{"id": "a", "label": true}', 400, 'expected a label from 0 to 4, or the name of a class, found true'),
  ],
)
def test_labels_that_are_refused(service, monkeypatch, body, status, error):
  monkeypatch.setattr(service.scheduler, 'takes_labels', lambda: True)
  service.predictor._remembered._answers['a'] = 1
  found = service.ask('POST', '/labels', body)
  assert found[0] == status and found[2]['error'].startswith(error)
  assert service.predictor._remembered._answers == {'a': 1}


def test_too_many_labels(bundle, monkeypatch):
  service = Service(bundle, max_bytes=10**7)
  monkeypatch.setattr(service.scheduler, 'takes_labels', lambda: True)
  found = service.ask('POST', '/labels', b' ' * 2**20 + b'{}')[::2]
  assert found == (413, {'error': 'expected at most 1,048,576 bytes, found more; send labels in parts'})


def test_answers_to_unknown_images_and_old_ones_take_no_label():
  remembered = Remembered(['a', 'b'], most=2)
  names = [remembered.add(label) for label in (0, None, 1)]
  assert remembered.take([{'id': names[1], 'label': 'b'}, {'id': names[2], 'label': 0}]) == [(0, 1)]
  with pytest.raises(Refused) as refused:
    remembered.take({'id': names[0], 'label': 0})
  assert refused.value.status == 404


def test_unknown_images_and_sets(service, bundle, monkeypatch):
  status, _, body = service.ask('POST', '/predict', PNG)
  assert status == 200 and not {'unknown', 'set'} & set(body['answers'][0])
  plain = body['answers'][0]
  sets = {'coverage': 0.9, 'penalty': 0.0, 'free': 1, 'limits': [0.0, 0.0, 0.0], 'anytime': None}
  monkeypatch.setattr(bundle, '_reject', {'risk': 0.1, 'delta': 0.1, 'confidence_threshold': None})
  monkeypatch.setattr(bundle, '_sets', sets)
  (answer,) = service.ask('POST', '/predict', PNG)[2]['answers']
  assert answer['unknown'] == (answer['exit'] == 3) and answer['set'] == [plain['class_name']]
  assert answer['class_name'] == (None if answer['unknown'] else plain['class_name'])
  assert (answer['probability'], answer['exit']) == (plain['probability'], plain['exit'])
  monkeypatch.setattr(bundle, 'thresholds', {1: None, 2: None, 3: 0.0})
  (answer,) = service.ask('POST', '/predict', PNG)[2]['answers']
  assert (answer['unknown'], answer['label'], answer['class_name'], answer['exit']) == (True, None, None, 3)
  (answer,) = service.ask('POST', '/predict', *form([PNG], [('deadline_ms', '100000')]))[2]['answers']
  assert len(answer['set']) == tiny_bundle.CLASSES  # A deadline may stop it at any exit.


def test_answers_of_a_batch_arrive_together():
  async def live():
    loop, answers, calls = asyncio.get_running_loop(), Answers(), []
    futures = [Future() for _ in range(4)]
    waiting = [asyncio.create_task(answers.of(future)) for future in futures]
    await asyncio.sleep(0)
    waiting[3].cancel()
    await asyncio.sleep(0)
    call_soon, loop.call_soon_threadsafe = (
      loop.call_soon_threadsafe,
      lambda *args: calls.append(args) or call_soon(*args),
    )

    def finish():
      futures[0].set_result('first')
      futures[1].set_exception(ArithmeticError('second'))
      futures[2].set_result('third')
      futures[3].set_result('of a client that has gone')

    thread = threading.Thread(target=finish)
    thread.start()
    thread.join()  # The event loop does not run meanwhile.
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [found[0], str(found[1]), found[2], type(found[3])] == ['first', 'second', 'third', asyncio.CancelledError]
    assert len(calls) == 1

  asyncio.run(live())
