"""Tests of the service when something is wrong that no client did; the application is called without a server."""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_bundle
from fastapi import Request

from paranet_jax.portable import run
from tests.examples.serve_test import PNG, form

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'examples'))

from batching import Scheduler, measure  # noqa: E402
from service import Predictor, make_app  # noqa: E402
from uploads import Refused, Uploads  # noqa: E402

MAX_BYTES = 1000


class Service:
  """The application of a tiny bundle."""

  def __init__(self, bundle):
    timings = measure(bundle, 4)
    self.scheduler = Scheduler(run, bundle, timings, 8, 4)
    self.predictor = Predictor(run, bundle, timings, self.scheduler, Uploads(MAX_BYTES, 8), 10**6)
    self.app = make_app(self.predictor, self.scheduler, lambda: None)

  def ask(self, method, path, body=b'', headers=()):
    """Status, headers and JSON of a response."""
    sent = []

    async def receive():
      return {'type': 'http.request', 'body': body}

    async def send(message):
      sent.append(message)

    scope = {'type': 'http', 'method': method, 'path': path, 'query_string': b'', 'app': self.app}
    scope['headers'] = [(name.lower().encode(), value.encode()) for name, value in dict(headers).items()]
    asyncio.run(self.app(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]['headers']}
    return sent[0]['status'], headers, json.loads(sent[1]['body'])


@pytest.fixture
def bundle(tmp_path):
  return run.load(tiny_bundle.write(tmp_path / 'bundle'), threads=1)


@pytest.fixture
def service(bundle):
  service = Service(bundle)
  service.scheduler.start()
  yield service
  service.scheduler.close()


def test_its_thread_lives_as_long_as_it_does(bundle):
  service, told = Service(bundle), []
  app = make_app(service.predictor, service.scheduler, lambda: told.append(service.scheduler.alive()))

  async def live():
    async with app.router.lifespan_context(app):
      assert told == [True]

  asyncio.run(live())
  assert not service.scheduler.alive()


def test_it_says_that_its_thread_has_ended(service):
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
  failed = {'error': 'the network failed on this image; the log of the service says how'}
  assert (status, body) == (500, failed | {'answers': [failed, failed]})
  assert 'ArithmeticError: of this stage' in capsys.readouterr().err
  assert service.ask('POST', '/predict', PNG)[0] == 200
  assert service.predictor.requests == {500: 1, 200: 1} and service.scheduler.inside == 0


def test_what_nobody_has_thought_of(service, monkeypatch):
  def failing(count):
    raise ArithmeticError('of ours')

  monkeypatch.setattr(service.scheduler, 'admit', failing)
  with pytest.raises(ArithmeticError, match='of ours'):  # The server logs it.
    service.ask('POST', '/predict', PNG)
  assert service.predictor.requests == {500: 1}


def test_all_that_is_sent_at_once_is_bounded():
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
