"""The service: `POST /predict` and `/labels`, `GET /healthz` and `/metrics`. Refused requests get {"error": one line}.

`POST /predict` takes one image as its body, or several as files of a form (multipart/form-data), and returns

  {"answers": [{"label": 3, "class_name": "3", "probability": 0.98, "exit": 1, "milliseconds": 2.1}, ...]}

in the order sent; milliseconds are from the request's arrival to the answer, waiting included. How the bundle was
calibrated adds fields:

  --reject: "unknown". Where it is true, the network is too unsure: "label" and "class_name" are null, and "probability"
    is that of the most probable class.
  --coverage: "set", the names of the classes that the image may have, most probable first.

A deadline or a budget changes where images exit. The promise of --reject, few errors, then no longer holds. The promise
of --coverage holds, with larger sets.

An image that cannot be answered has {"error": "..."} in its place. The status is 200 if any image is answered.
Otherwise it is the status that all images share (413: too many pixels; 500: the network failed), or else 400, with the
first "error" next to "answers".

A whole request is refused with 400 (no image, an unknown field or a malformed form), 408 (not sent in time), 413 (too
many bytes, declared, read, or to decode), 415 (compressed, or a form of another type), 431 (long headers) or 503 with
Retry-After (no room for its images, too long a wait, or too many bytes in flight). The wait is what requests that
arrive now should spend before their turn: in the event loop, for decoding and for the stages.

The query or the form may have one of
  budget_ms: no image goes to an exit that a single image reaches later than this on this machine, as measured at
    start-up; waiting does not count.
  deadline_ms: the best answer available this many milliseconds after the request arrived, waiting included. An image
    exits earlier where it is confident enough. A stage starts only if it should finish in time, but the first always
    runs: an answer may be late, but a request that would only wait until its deadline is refused with 503.

With --watch and a bundle calibrated with labels, answers that no budget and no deadline may have changed also have an
"id". Once the right class of an image is known, `POST /labels` takes it, as a number or a name, and the watch tests
whether answers are wrong as often as in calibration:

  [{"id": "5f0c2a91-1", "label": 3}, {"id": "5f0c2a91-2", "label": "cat"}] -> {"recorded": 2}

Which images are labeled, and in which order, must not depend on their answers: label all, or draw some by chance, in
the order in which the images were sent. Under load, deep images are answered later than others, so labels that are sent
as answers come look like errors that change. Each id is taken once. The latest 100,000 are remembered until the service
stops. Unknown images do not count. If an entry is refused (400, or 404: there is no such id), none is taken. A request
may also get 408, 413 (more than 1 MiB) or 503, as a prediction does. Without such a watch, the status is 404.
"""

import asyncio
import contextlib
import functools
import json
import math
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from batching import Answer, Full, Place, Scheduler, Timings
from connections import MAX_HEADERS
from decoding import Decoders
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from labels import MAX_BYTES, Remembered, parse_entries
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from uploads import FIELDS, Refused, Uploads

MAX_WAIT = 0.5
"""Seconds that a request may have to wait for its turn, by default; or two full batches if those take longer."""
_MOST_LAG = 4  # Longest waits that the event loop may be late: refusing costs it nearly as much as answering.
_UNNOTICED = 0.02  # Seconds of waiting for which no request is refused, whatever its deadline.
_GONE = 499  # As nginx logs a client that disconnected; never sent.
_DOCUMENTED = {
  'parameters': [{'name': name, 'in': 'query', 'schema': {'type': 'number'}} for name in FIELDS],
  'requestBody': {
    'content': {
      'image/*': {'schema': {'type': 'string', 'format': 'binary'}},
      'multipart/form-data': {
        'schema': {'properties': {'image': {'type': 'array', 'items': {'type': 'string', 'format': 'binary'}}}}
      },
    }
  },
}

Outcome = tuple[int, dict[str, Any]]
"""The status and the answer of one image."""


class Predictor:
  """Answers requests. requests: their number by status."""

  def __init__(
    self,
    bundle: Any,
    timings: Timings,
    scheduler: Scheduler,
    uploads: Uploads,
    decoders: Decoders,
    max_wait: float = MAX_WAIT,
  ):
    """max_wait: seconds that a request may have to wait for its turn."""
    self._bundle, self._scheduler, self._uploads, self._decoders = bundle, scheduler, uploads, decoders
    self._alone, self._max_wait, self.lag = timings.alone(), max_wait, Lag()
    self._answers = Answers()
    self.requests: Counter[int] = Counter()
    self._remembered = Remembered(bundle.class_names)

  def check_wait(self, sizes: Sequence[int] = (), seconds: float = math.inf) -> None:
    """Refuses a request whose turn should come too late.

    Args:
      sizes: bytes to decode, by image.
      seconds: until its deadline.

    Raises:
      Refused: 503.
    """
    wait = self._scheduler.wait() + self._decoders.wait(sizes)
    if wait > self._max_wait or self.lag.seconds > _MOST_LAG * self._max_wait or wait > max(seconds, _UNNOTICED):
      limit = min(self._max_wait, max(seconds, _UNNOTICED))
      raise Refused(
        503, f'expected a wait of at most {1e3 * limit:.0f} ms, found {1e3 * (wait + self.lag.seconds):.0f}; try again'
      )

  async def answer(self, request: Request) -> Response:
    """The response to a request."""
    try:
      response = await _or_refusal(self._predict(request, time.perf_counter()))
    except Exception:
      self.requests[500] += 1
      raise
    self.requests[response.status_code] += 1
    return response

  async def label(self, request: Request) -> Response:
    """The response to labels."""
    return await _or_refusal(self._record(request))

  async def _predict(self, request: Request, arrived: float) -> Response:
    async with self._uploads.read(request) as upload:
      return _together(await self._outcomes(upload.images, upload.fields, arrived))

  async def _record(self, request: Request) -> Response:
    if not self._scheduler.takes_labels():
      expected = 'expected a watch that tests errors, found none'
      raise Refused(404, f'{expected}; set --watch, with a bundle of labeled images, or calibrate it again')
    async with self._uploads.read_body(request, MAX_BYTES, 'send labels in parts') as body:
      entries = parse_entries(body)
    if not self._scheduler.alive():
      raise Refused(503, 'the service is stopping')
    pairs = self._remembered.take(entries)
    self._scheduler.record(pairs)
    return JSONResponse({'recorded': len(pairs)})

  async def _outcomes(self, images: Sequence[bytes], fields: dict[str, float], arrived: float) -> list[Outcome]:
    last = self._last(fields.get('budget_ms', math.inf))
    deadline = arrived + fields.get('deadline_ms', math.inf) / 1e3
    if not self._scheduler.alive():
      raise Refused(503, 'the service is stopping')
    with self._scheduler.arrive(len(images)) as places:
      tiny = self._decoders.decode_tiny(images[0]) if len(images) == 1 else None
      sizes = [0] if tiny is not None else await self._decoders.sizes(images)
      self.check_wait(sizes, deadline - arrived)
      try:
        self._scheduler.admit(len(images))
      except Full as error:
        raise Refused(503, f'no room for {len(images)} images now; try again') from error
      if tiny is not None:
        return [await self._outcome(_return(tiny), arrived, last, deadline, places[0])]
      decoding = (self._decoders.decode(*image) for image in zip(images, sizes, strict=True))
      found = zip(decoding, places, strict=True)
      return await asyncio.gather(*(self._outcome(image, arrived, last, deadline, place) for image, place in found))

  async def _outcome(
    self, decoding: Awaitable[Any], arrived: float, last: int, deadline: float, place: Place
  ) -> Outcome:
    try:
      image = await decoding
      answer = await self._answers.of(self._scheduler.submit(image, arrived, last, deadline, place))
    except Refused as refused:
      return refused.status, {'error': refused.reason}
    except Exception as error:  # A stage failed; other images are still answered.
      traceback.print_exception(error, file=sys.stderr)
      return 500, {'error': 'the network failed on this image; see the log of the service'}
    finally:
      self._scheduler.release()
    if math.isnan(answer.probability):  # JSON has no NaN, which would fail the other images of the request.
      return 500, {'error': "the network's answer is not finite"}
    found: dict[str, Any] = {
      'label': answer.label,
      'class_name': None if answer.label is None else self._name(answer.label),
      'probability': round(answer.probability, 6),
      'exit': answer.exit,
      'milliseconds': round(1e3 * answer.seconds, 3),
    }
    if getattr(self._bundle, 'rejects', False):
      found['unknown'] = answer.label is None
    if answer.held is not None:
      found['set'] = [self._name(label) for label in answer.held]
    if answer.free and self._scheduler.takes_labels():
      found['id'] = self._remembered.add(answer.label)
    return 200, found

  def _name(self, label: int) -> str:
    return self._bundle.class_names[label].encode('utf-8', 'backslashreplace').decode()

  def _last(self, budget_ms: float) -> int:
    """The number of the last exit within the budget."""
    within = [number for number, seconds in self._alone.items() if 1e3 * seconds <= budget_ms]
    if not within:
      least = math.ceil(1e5 * min(self._alone.values())) / 100
      raise Refused(400, f'expected a budget_ms of {least:.2f} or more, as the first exit takes, found {budget_ms:g}')
    return within[-1]


async def _return(value: Any) -> Any:
  return value


class Answers:
  """Brings answers from the thread of the stages to the event loop: those of a batch together, in one turn of it."""

  def __init__(self) -> None:
    self._ready: deque[tuple[asyncio.Future[Answer], Future[Answer]]] = deque()
    self._called = False

  async def of(self, answer: 'Future[Answer]') -> Answer:
    """Waits for an answer; raises its exception."""
    loop = asyncio.get_running_loop()
    waiting = loop.create_future()
    answer.add_done_callback(functools.partial(self._add, loop, waiting))
    return await waiting

  def _add(self, loop: asyncio.AbstractEventLoop, waiting: 'asyncio.Future[Answer]', answer: 'Future[Answer]') -> None:
    self._ready.append((waiting, answer))
    if not self._called:
      self._called = True
      try:
        loop.call_soon_threadsafe(self._deliver)
      except RuntimeError:  # The event loop has been closed: nothing waits any more.
        self._called = False

  def _deliver(self) -> None:
    self._called = False  # First: what is added from now on calls again.
    while self._ready:
      waiting, answer = self._ready.popleft()
      if waiting.cancelled():
        continue
      if error := answer.exception():
        waiting.set_exception(error)
      else:
        waiting.set_result(answer.result())


class Lag:
  """How late the event loop is: what it has to do before a request that arrives now. seconds: of the last moments."""

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock, self.seconds = clock, 0.0

  async def watch(self) -> None:
    """Measures until cancelled."""
    while True:
      before = self._clock()
      await asyncio.sleep(_TICK)
      self.seconds = max(self._clock() - before - _TICK, self.seconds / 2)


_TICK = 0.02


class Gate:
  """Refuses requests before anything of them is read: long headers, and predictions that would wait too long."""

  def __init__(self, app: ASGIApp, predictor: Predictor):
    self._app, self._predictor = app, predictor

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    answer: ASGIApp = self._app
    if scope['type'] == 'http':
      try:
        self._check(scope)
      except Refused as refused:
        self._predictor.requests[refused.status] += 1
        answer = _refusal(refused.status, refused.reason)
    await answer(scope, receive, send)

  def _check(self, scope: Scope) -> None:
    if sum(len(name) + len(value) for name, value in scope['headers']) + len(scope['query_string']) > MAX_HEADERS:
      raise Refused(431, f'expected at most {MAX_HEADERS:,} bytes of headers, found more')
    if scope['method'] == 'POST' and scope['path'] == '/predict':
      self._predictor.check_wait()


class _Service(FastAPI):
  """Answers predictions before FastAPI's middleware and routing, which take longer than the rest of a request."""

  predict: ASGIApp | None = None

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    whole = super().__call__
    if self.predict is None or scope['type'] != 'http' or scope['method'] != 'POST' or scope['path'] != '/predict':
      await whole(scope, receive, send)
    elif any(name == b'origin' for name, _ in scope['headers']):  # Of a page: CORS.
      await whole(scope, receive, send)
    else:
      await self.predict(scope, receive, send)


def make_app(
  predictor: Predictor, scheduler: Scheduler, started: Callable[[], None], origins: Sequence[str] = ()
) -> FastAPI:
  """The application.

  Args:
    started: called once it serves.
    origins: of other sites whose pages may call it.
  """

  @contextlib.asynccontextmanager
  async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    scheduler.start()
    started()
    watching = asyncio.create_task(predictor.lag.watch())
    yield
    watching.cancel()
    await asyncio.to_thread(scheduler.close)

  app = _Service(title='Early exits', lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)

  @app.post('/predict', openapi_extra=_DOCUMENTED)
  async def predict(request: Request) -> Response:
    return await predictor.answer(request)

  @app.post('/labels')
  async def labels(request: Request) -> Response:
    return await predictor.label(request)

  @app.get('/healthz')
  async def healthz() -> Response:
    alive = scheduler.alive()
    if not alive:
      return _refusal(503, 'the thread of the stages has ended')
    drift = scheduler.watch.line() if scheduler.watch and scheduler.watch.alarm else None
    return JSONResponse({'status': 'degraded', 'drift': drift} if drift else {'status': 'ok'})

  @app.get('/metrics')
  async def metrics() -> Response:
    text = ''.join(f'{line}\n' for line in metric_lines(predictor, scheduler))
    return PlainTextResponse(text, media_type='text/plain; version=0.0.4')

  for path, answer in (('/healthz', healthz), ('/metrics', metrics)):
    app.add_api_route(path, answer, methods=['HEAD'], include_in_schema=False)

  @app.exception_handler(HTTPException)
  async def unknown(request: Request, error: HTTPException) -> Response:
    allowed = {name for route in app.routes if route.path == request.url.path for name in route.methods}
    if error.status_code == 405:
      error.headers = {'Allow': ', '.join(sorted(allowed | {'OPTIONS'}))}
      if request.method == 'OPTIONS':
        return Response(status_code=204, headers=error.headers)
    return JSONResponse({'error': str(error.detail)}, error.status_code, error.headers)

  @app.exception_handler(Exception)
  async def failed(_: Request, error: Exception) -> Response:
    return _refusal(500, 'the service failed; see its log')

  async def at_once(scope: Scope, receive: Receive, send: Send) -> None:
    scope['app'] = app  # Without it, Starlette raises other errors for forms that cannot be parsed.
    try:
      response = await predictor.answer(Request(scope, receive))
    except Exception as error:
      await (await failed(Request(scope), error))(scope, receive, send)
      raise  # The server logs it.
    await response(scope, receive, send)

  app.predict = Gate(at_once, predictor)
  app.add_middleware(Gate, predictor=predictor)
  if origins:
    app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=['*'], expose_headers=['Retry-After'])
  return app


def metric_lines(predictor: Predictor, scheduler: Scheduler) -> Iterator[str]:
  """Metrics in the text format of Prometheus."""
  exits, runs = scheduler.exits, scheduler.runs
  yield from _metric('requests_total', 'counter', {f'{{status="{code}"}}': n for code, n in predictor.requests.items()})
  yield from _metric('images_total', 'counter', {f'{{exit="{number}"}}': count for number, count in exits.items()})
  yield from _metric('queue_images', 'gauge', {'': scheduler.inside})
  yield from _metric('image_seconds', 'summary', {'_sum': scheduler.seconds, '_count': sum(exits.values())})
  batches, seconds = {}, {}
  for number, run in runs.items():
    batches |= {f'_sum{{exit="{number}"}}': run.images, f'_count{{exit="{number}"}}': run.count}
    seconds |= {f'_sum{{exit="{number}"}}': run.seconds, f'_count{{exit="{number}"}}': run.count}
  yield from _metric('stage_batch_images', 'summary', batches)
  yield from _metric('stage_seconds', 'summary', seconds)
  if watch := scheduler.watch:
    yield from _metric('drift', 'gauge', {'': int(watch.alarm is not None)})
    yield from _metric('drift_evidence', 'gauge', {'': watch.evidence})
    yield from _metric('watched_images_total', 'counter', {'': watch.images})
    yield from _metric('labeled_images_total', 'counter', {'': watch.labeled})


def _metric(name: str, kind: str, values: dict[str, float]) -> Iterator[str]:
  yield f'# TYPE paranet_{name} {kind}'
  for suffix, value in values.items():
    yield f'paranet_{name}{suffix} {value}'


class _Json(Response):
  """As JSONResponse, which makes an encoder for each response."""

  media_type = 'application/json'
  _encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(',', ':')).encode

  def render(self, content: Any) -> bytes:
    return self._encode(content).encode()


async def _or_refusal(answering: Awaitable[Response]) -> Response:
  """The response, or the one that says why there is none."""
  try:
    return await answering
  except Refused as refused:
    return _refusal(refused.status, refused.reason)
  except HTTPException as error:  # The form cannot be parsed.
    return _refusal(error.status_code, str(error.detail))
  except ClientDisconnect:
    return Response(status_code=_GONE)


def _together(outcomes: Sequence[Outcome]) -> Response:
  statuses, answers = {status for status, _ in outcomes}, [answer for _, answer in outcomes]
  if 200 in statuses:
    return _Json({'answers': answers})
  return _Json(answers[0] | {'answers': answers}, statuses.pop() if len(statuses) == 1 else 400)


def _refusal(status: int, reason: str) -> Response:
  return JSONResponse({'error': reason}, status, {'Retry-After': '1'} if status == 503 else None)
