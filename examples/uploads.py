"""Reads the images and fields of a request, within limits."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import Message

T = TypeVar('T')

FIELDS = ('budget_ms', 'deadline_ms')
READ_SECONDS = 30
"""Seconds in which a client must have sent its whole request."""
_HELD = 16  # All requests together may hold this many largest bodies.


class Refused(Exception):
  """An HTTP status, and one line that says why."""

  def __init__(self, status: int, reason: str):
    super().__init__(reason)
    self.status, self.reason = status, reason


class Upload(NamedTuple):
  """images: encoded, in the order sent. fields: milliseconds by name."""

  images: list[bytes]
  fields: dict[str, float]


class Uploads:
  """Reads requests of at most `max_bytes` each, and of 16 times that together."""

  def __init__(self, max_bytes: int, max_images: int, seconds: float = READ_SECONDS):
    """seconds: in which a request must have arrived."""
    self._max_bytes, self._max_images, self._seconds, self._held = max_bytes, max_images, seconds, 0

  def read(self, request: Request) -> 'Reading[Upload]':
    """Reads a request, whose bytes count as held until the context ends: `async with uploads.read(request) as upload`.

    Raises:
      Refused: 400, 408, 413, 415 or 503.
      HTTPException: 400, a form cannot be parsed.
      ClientDisconnect: the client has gone.
    """
    return Reading(self, request, self._upload, self._max_bytes, 'send fewer or smaller images')

  def read_body(self, request: Request, max_bytes: int, remedy: str) -> 'Reading[bytes]':
    """As `read`, for the body of a request that is none of images.

    Args:
      max_bytes: of this body, if they are fewer than those of any request.
      remedy: what to do about a longer one.

    Raises:
      Refused: 408, 413 or 503.
      ClientDisconnect: the client has gone.
    """
    return Reading(self, request, self._read_body, min(max_bytes, self._max_bytes), remedy)

  async def _upload(self, body: 'Reading[Upload]') -> Upload:
    headers = dict(body.request.scope['headers'])  # Names are in lower case.
    kind, coding = (
      headers[name].decode('latin-1').strip().lower() if name in headers else ''
      for name in (b'content-type', b'content-encoding')
    )
    body.is_form = kind.startswith('multipart/form-data')
    if coding not in ('', 'identity') or kind.startswith('multipart/') and not body.is_form:
      found = f'Content-Encoding: {coding[:40]}' if coding else f'Content-Type: {kind[:40]}'
      raise Refused(415, f'expected an image or a form (multipart/form-data), not compressed, found {found}')
    upload = await (self._read_form(body) if body.is_form else self._read_image(body))
    if not upload.images:
      raise Refused(400, 'expected an image, found none; send one as the body, or several as files of a form')
    return upload

  async def in_time(self, body: 'Reading[Any]', read: Awaitable[T]) -> T:
    """What `read` returns.

    Raises:
      Refused: 408, the request has not arrived in time.
    """
    try:
      async with asyncio.timeout(self._seconds):
        return await read
    except TimeoutError as error:
      raise Refused(408, f'expected the whole request within {self._seconds:g} s, found {body.size:,} bytes') from error

  async def _receive(self, body: 'Reading[Any]') -> Message:
    message = await body.request.receive()
    if message['type'] != 'http.request':
      return message
    chunk = message.get('body', b'')
    body.size, self._held = body.size + len(chunk), self._held + len(chunk)
    if body.size > body.max_bytes:
      raise body.too_large()
    if self._held > _HELD * self._max_bytes:
      raise Refused(503, 'too many bytes are being sent at once; try again')
    if body.is_form:
      body.tail = (body.tail + chunk)[-64:]
      if not message.get('more_body') and not body.tail.rstrip().endswith(b'--'):
        # The parser would silently drop the file that was cut.
        raise Refused(400, 'expected a whole form, found no boundary that closes it; send it again')
    return message

  async def _read_form(self, body: 'Reading[Any]') -> Upload:
    request = Request(body.request.scope, lambda: self._receive(body))
    try:
      async with request.form(max_files=self._max_images, max_fields=len(FIELDS) + 1, max_part_size=1024) as form:
        parts = form.multi_items()
        images = [await part.read() for _, part in parts if isinstance(part, UploadFile)]
        texts = [(name, part) for name, part in parts if isinstance(part, str)]
    except UnicodeError as error:  # Of codecs that decode nothing, Starlette does not catch it.
      raise Refused(400, 'expected a form in UTF-8, found another charset; leave it out of Content-Type') from error
    return Upload(images, read_fields([*request.query_params.multi_items(), *texts]))

  async def _read_image(self, body: 'Reading[Any]') -> Upload:
    encoded = await self._read_body(body)
    query = body.request.scope['query_string'] and body.request.query_params.multi_items()
    return Upload([encoded] if encoded else [], read_fields(query or ()))

  async def _read_body(self, body: 'Reading[Any]') -> bytes:
    chunks, more = [], True
    while more:
      message = await self._receive(body)
      if message['type'] == 'http.disconnect':
        raise ClientDisconnect
      chunks.append(message.get('body', b''))
      more = message.get('more_body', False)
    return b''.join(chunks)

  def let_go(self, size: int) -> None:
    """So many bytes are no longer held."""
    self._held -= size


class Reading(Generic[T]):
  """A request that is read, and held until the context ends.

  Attributes:
    size: bytes received, of at most `max_bytes`. tail: the last ones of a form.
  """

  def __init__(
    self, uploads: Uploads, request: Request, read: Callable[..., Awaitable[T]], max_bytes: int, remedy: str
  ):
    self._uploads, self.request, self._read, self._remedy = uploads, request, read, remedy
    self.size, self.max_bytes, self.is_form, self.tail = 0, max_bytes, False, b''

  def too_large(self) -> Refused:
    """What refuses a longer request."""
    return Refused(413, f'expected at most {self.max_bytes:,} bytes, found more; {self._remedy}')

  async def __aenter__(self) -> T:
    declared = dict(self.request.scope['headers']).get(b'content-length', b'')
    # Python reads no number of thousands of digits, and those before it may be zeros.
    if declared.isdigit() and int(declared.lstrip(b'0')[:20] or b'0') > self.max_bytes:
      raise self.too_large()
    try:
      return await self._uploads.in_time(self, self._read(self))
    except BaseException:
      self._uploads.let_go(self.size)
      raise

  async def __aexit__(self, *_: object) -> None:
    self._uploads.let_go(self.size)


def read_fields(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
  """The fields of a request, by name.

  Raises:
    Refused: 400; a field is unknown, not a positive number, or not the only one.
  """
  found = {}
  for name, text in pairs:
    if name == 'image':
      raise Refused(400, 'expected a file as image, found text; send it with a filename, as curl -F image=@FILE does')
    if name not in FIELDS:
      raise Refused(400, f'unknown field {name[:40]!r}, expected {" or ".join(FIELDS)}')
    if found:
      raise Refused(400, f'expected one of {" and ".join(FIELDS)}, once, found several; leave out all but one')
    found[name] = _positive(name, text)
  return found


def _positive(name: str, text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise Refused(400, f'expected {name} in milliseconds, above 0, found {text[:40]!r}')
  return value


def guarded(runtime: ModuleType, max_pixels: int, read: Callable[..., Any]) -> Any:
  """What `read` returns, given the limits that this run.py takes; its exceptions become `Refused`: 400 or 413."""
  from PIL.Image import DecompressionBombError, UnidentifiedImageError

  # The run.py of version 0.1.0 has no limit of its own; serve.py sets Pillow's.
  limited = hasattr(runtime, 'TooManyPixels')
  try:
    return read(*([max_pixels] if limited else []))
  except getattr(runtime, 'TooManyPixels', DecompressionBombError) as error:
    found = error if limited else f'expected at most {max_pixels:,} pixels, found more'
    raise Refused(413, f'{found}; send a smaller image') from error
  except Exception as error:  # Damaged bytes make Pillow raise almost anything.
    if limited:
      reason = runtime.damage(error)
    elif isinstance(error, UnidentifiedImageError):  # Its message names an object in memory.
      reason = 'not an image in a known format'
    else:
      reason = ' '.join(str(error).split()) or type(error).__name__
    raise Refused(400, reason[:200]) from error
