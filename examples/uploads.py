"""Reads the images and fields of a request, within limits."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.types import Message, Receive

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

  @contextlib.asynccontextmanager
  async def read(self, request: Request) -> AsyncIterator[Upload]:
    """Reads a request, whose bytes count as held until the context ends.

    Raises:
      Refused: 400, 408, 413, 415 or 503.
      HTTPException: 400, a form cannot be parsed.
    """
    declared = request.headers.get('content-length', '')
    if declared.isdecimal() and int(declared) > self._max_bytes:
      raise self._too_large()
    kind, coding = (request.headers.get(name, '').strip().lower() for name in ('content-type', 'content-encoding'))
    is_form = kind.startswith('multipart/form-data')
    if coding not in ('', 'identity') or kind.startswith('multipart/') and not is_form:
      found = f'Content-Encoding: {coding[:40]}' if coding else f'Content-Type: {kind[:40]}'
      raise Refused(415, f'expected an image or a form (multipart/form-data), not compressed, found {found}')
    body = _Body(request.receive, is_form)
    request = Request(request.scope, lambda: self._receive(body))
    try:
      upload = await asyncio.wait_for(self._read_form(request) if is_form else _read_body(request), self._seconds)
      if not upload.images:
        raise Refused(400, 'expected an image, found none; send one as the body, or several as files of a form')
    except TimeoutError as error:
      self._held -= body.size
      raise Refused(408, f'expected the whole request within {self._seconds:g} s, found {body.size:,} bytes') from error
    except BaseException:
      self._held -= body.size
      raise
    try:
      yield upload
    finally:
      self._held -= body.size

  async def _receive(self, body: '_Body') -> Message:
    message = await body.receive()
    if message['type'] != 'http.request':
      return message
    chunk = message.get('body', b'')
    body.size, self._held = body.size + len(chunk), self._held + len(chunk)
    body.tail = (body.tail + chunk)[-64:]
    if body.size > self._max_bytes:
      raise self._too_large()
    if self._held > _HELD * self._max_bytes:
      raise Refused(503, 'too many bytes are being sent at once; try again')
    if body.is_form and not message.get('more_body') and not body.tail.rstrip().endswith(b'--'):
      # The parser would silently drop the file that was cut.
      raise Refused(400, 'expected a whole form, found no boundary that closes it; send it again')
    return message

  async def _read_form(self, request: Request) -> Upload:
    async with request.form(max_files=self._max_images, max_fields=len(FIELDS) + 1, max_part_size=1024) as form:
      parts = form.multi_items()
      images = [await part.read() for _, part in parts if isinstance(part, UploadFile)]
      texts = [(name, part) for name, part in parts if isinstance(part, str)]
    return Upload(images, read_fields([*request.query_params.multi_items(), *texts]))

  def _too_large(self) -> Refused:
    return Refused(413, f'expected at most {self._max_bytes:,} bytes, found more; send fewer or smaller images')


async def _read_body(request: Request) -> Upload:
  encoded = await request.body()
  return Upload([encoded] if encoded else [], read_fields(request.query_params.multi_items()))


class _Body:
  def __init__(self, receive: Receive, is_form: bool):
    self.receive, self.is_form, self.size, self.tail = receive, is_form, 0, b''


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
