"""uvicorn's server and HTTP/1.1 protocol: JSON for what is not HTTP, and a stop that loses no request."""

import asyncio
import contextlib
import json
import socket
import sys
import time
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADERS = 16_384
"""Bytes of a request's first line and headers."""
KEEP_ALIVE = 75
"""Seconds after which an idle connection is closed: longer than proxies keep theirs, who would send on a closed one."""
LINGER = 2
"""Seconds after a signal in which kept connections may send a last request; it is answered with Connection: close."""
LONGEST_STOP = 30
"""Seconds after a signal that clients have to send what is missing and to read their answers."""
_REASONS = {400: b'Bad Request', 431: b'Request Header Fields Too Large', 501: b'Not Implemented'}


class _Malformed(Exception):
  """What arrived is HTTP that is refused."""


class _Joining:
  """A transport that sends what is written in a turn of the event loop at once: the head of an answer and its body."""

  def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
    self._transport, self._loop, self._parts = transport, loop, []
    self.get_extra_info, self.is_closing = transport.get_extra_info, transport.is_closing
    self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading
    self.abort = transport.abort

  def write(self, data: bytes) -> None:
    if not self._parts:
      self._loop.call_soon(self._flush)
    self._parts.append(data)

  def close(self) -> None:
    self._flush()
    self._transport.close()

  def _flush(self) -> None:
    if self._parts:
      self._transport.write(b''.join(self._parts))
      self._parts.clear()


class Protocol(HttpToolsProtocol):
  """Answers requests that are not HTTP/1.1 with {"error": one line}."""

  def __init__(self, *args: Any, **options: Any):
    super().__init__(*args, **options)
    self._in_head, self._head = True, 0  # Bytes of a head that has not ended.
    self._unread, self._again = b'', False  # Headers of a body that is still to be read; they are parsed again.

  def connection_made(self, transport: asyncio.Transport) -> None:
    """A client has connected."""
    super().connection_made(_Joining(transport, self.loop))

  def data_received(self, data: bytes) -> None:
    """Parses what arrives."""
    self._unset_keepalive_if_required()
    try:
      self._feed(data)
      if self._in_head and self._head > MAX_HEADERS:
        self._refuse('Receive buffer too long', 431)
    except httptools.HttpParserError as error:
      reason = ' '.join(str(error.__context__ or error).split())  # The context is what a callback has raised.
      self._refuse(reason, 501 if 'invalid `Transfer-Encoding`' in reason else 400)

  def _feed(self, data: bytes) -> None:
    while data:
      if self._in_head:
        self._head += len(data)
      try:
        self.parser.feed_data(data)
        return
      except httptools.HttpParserUpgrade as upgrade:  # To another protocol, which is not offered: HTTP goes on.
        data = data[upgrade.args[0] :]
      if self._unread:
        head, self._unread, self._again = b'POST / HTTP/1.1\r\n%b\r\n' % self._unread, b'', True
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # As uvicorn's.
        self.parser.feed_data(head)

  def on_message_begin(self) -> None:
    """A request has begun."""
    super().on_message_begin()
    self._in_head = True

  def on_headers_complete(self) -> None:
    """Its head is here."""
    self._in_head, self._head = False, 0
    if self._again:
      self._again = False
      return
    if self.parser.get_http_version() == '1.1' and not any(name == b'host' for name, _ in self.headers):
      raise _Malformed('Missing mandatory Host: header')
    super().on_headers_complete()

  def on_message_complete(self) -> None:
    """It has ended, or it asks for another protocol: the parser takes its body for what is sent in that."""
    if self.parser.should_upgrade():
      of_body = (field for field in self.headers if field[0] in (b'content-length', b'transfer-encoding'))
      self._unread = b''.join(b'%b: %b\r\n' % field for field in of_body)
      if self._unread:
        return
    super().on_message_complete()
    self._in_head, self._head = True, 0

  def _refuse(self, reason: str, status: int) -> None:
    """Answers what is not HTTP, unless an answer has been started, and closes the connection."""
    if self.transport.is_closing():
      return
    if self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body:
      self.cycle.keep_alive = False  # What came before it is answered, and the connection then closed.
      self.flow.pause_reading()
      return
    if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
      body = json.dumps({'error': f'expected an HTTP/1.1 request, found a malformed one ({reason[:200]})'}).encode()
      head = b'HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n'
      self.transport.write(head % (status, _REASONS[status], len(body)) + body)
    self.transport.close()

  def timeout_keep_alive_handler(self) -> None:
    """Closes an idle connection, unless a request has arrived that the event loop has not read yet."""
    if self._has_unread():
      self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
    else:
      super().timeout_keep_alive_handler()

  def _has_unread(self) -> bool:
    with contextlib.suppress(OSError), self.transport.get_extra_info('socket').dup() as connection:
      return bool(connection.recv(1, socket.MSG_PEEK))
    return False


class Server(uvicorn.Server):
  """Stops in this order: no new connections; what has arrived is answered with Connection: close; the rest is cut."""

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    started = time.monotonic()
    await self._close_listeners(sockets or [])
    closing = [*self.server_state.default_headers, (b'connection', b'close')]
    self.server_state.default_headers = closing
    for connection in self.server_state.connections:
      if connection.cycle is not None and not connection.cycle.response_started:
        connection.cycle.default_headers = closing
    while self.server_state.connections and not self.force_exit:
      seconds = time.monotonic() - started
      if seconds > LINGER:
        for connection in list(self.server_state.connections):
          connection.shutdown()  # Closes it if idle, or else after its answer.
      if seconds > LONGEST_STOP:
        break
      await asyncio.sleep(0.02)
    if stalled := list(self.server_state.connections):
      found = f'{len(stalled)} connection{"s" * (len(stalled) > 1)}'
      why = 'requests that had not arrived whole or were being worked on, or answers that were not read'
      print(f'cut {found} after {LONGEST_STOP} s: {why}', file=sys.stderr)
    for connection in stalled:
      connection.transport.abort()
    await super().shutdown(sockets)

  async def _close_listeners(self, sockets: list[socket.socket]) -> None:
    """Closes the listening sockets; the connections that clients have opened by now are served."""
    opened = []
    for listening in sockets:
      listening.listen(0)  # The kernel completes no more connections, but for one.
      listening.setblocking(False)
      with contextlib.suppress(OSError):  # None is left.
        while True:
          opened.append(listening.accept()[0])
    for server in self.servers:
      server.close()
    for listening in sockets:
      listening.close()
    loop = asyncio.get_running_loop()
    for connection in opened:
      await loop.connect_accepted_socket(
        lambda: self.config.http_protocol_class(
          config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
        ),
        connection,
      )
