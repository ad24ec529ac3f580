"""uvicorn's server and HTTP/1.1 protocol: JSON for what is not HTTP, and a stop that loses no request."""

import asyncio
import contextlib
import json
import socket
import sys
import time
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADERS = 16_384
"""Bytes of a request's first line and headers."""
KEEP_ALIVE = 75
"""Seconds after which an idle connection is closed: longer than proxies keep theirs, who would send on a closed one."""
LINGER = 2
"""Seconds after a signal in which kept connections may send a last request; it is answered with Connection: close."""
LONGEST_STOP = 30
"""Seconds after a signal that clients have to send what is missing and to read their answers."""


class _Connection(h11.Connection):
  """Keeps its last error, of which uvicorn says only that there was one."""

  error: h11.RemoteProtocolError | None = None

  def next_event(self) -> Any:
    try:
      return super().next_event()
    except h11.RemoteProtocolError as error:
      self.error = error
      raise


class Protocol(H11Protocol):
  """Answers requests that are not HTTP/1.1 with {"error": one line}."""

  def __init__(self, *args: Any, **options: Any):
    super().__init__(*args, **options)
    self.conn = _Connection(h11.SERVER, MAX_HEADERS)

  def send_400_response(self, msg: str) -> None:
    error = self.conn.error
    reason = ' '.join(str(error or msg).split())[:200]
    body = json.dumps({'error': f'expected an HTTP/1.1 request, found a malformed one ({reason})'}).encode()
    headers = [
      ('Content-Type', 'application/json'),
      ('Content-Length', str(len(body))),
      ('Connection', 'close'),
    ]
    with contextlib.suppress(h11.LocalProtocolError):  # A response has been started.
      for event in (
        h11.Response(status_code=error.error_status_hint if error else 400, headers=headers),
        h11.Data(data=body),
        h11.EndOfMessage(),
      ):
        self.transport.write(self.conn.send(event))
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
