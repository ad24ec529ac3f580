"""The service without a server: requests are calls of its application."""

import asyncio
import json

from batching import Scheduler, measure
from decoding import Decoders
from service import Predictor, make_app
from uploads import Uploads

from paranet_jax.portable import run

MAX_BYTES = 1000


class Service:
  """The application of a bundle."""

  def __init__(self, bundle, origins=(), max_bytes=MAX_BYTES):
    timings = measure(bundle, 4)
    self.scheduler = Scheduler(run, bundle, timings, 8, 4)
    decoders = Decoders(run, bundle.image_shape, 10**6, 10**6)
    self.predictor = Predictor(bundle, timings, self.scheduler, Uploads(max_bytes, 8), decoders)
    self.app = make_app(self.predictor, self.scheduler, lambda: None, origins)

  def ask(self, method, path, body=b'', headers=(), messages=None):
    """Status, headers and JSON of a response.

    Args:
      messages: what the server hands over instead of the body, before it waits without end.
    """
    sent, messages = [], [{'type': 'http.request', 'body': body}] if messages is None else [*messages]

    async def receive():
      return messages.pop(0) if messages else await asyncio.Future()

    async def send(message):
      sent.append(message)

    scope = {'type': 'http', 'method': method, 'path': path, 'query_string': b'', 'app': self.app}
    scope['headers'] = [(name.lower().encode(), value.encode()) for name, value in dict(headers).items()]
    asyncio.run(asyncio.wait_for(self.app(scope, receive, send), 60))
    headers = {name.decode(): value.decode() for name, value in sent[0]['headers']}
    body = sent[1]['body']
    return sent[0]['status'], headers, json.loads(body) if body[:1] == b'{' else body
