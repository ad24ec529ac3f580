"""The server that stops: what has arrived is answered, and what stalls is cut, by an application of the test."""

import asyncio
import contextlib
import socket

import connections
import pytest
import uvicorn

REQUEST = b'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody'
UPGRADE = REQUEST.replace(b'\r\n\r\n', b'\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n')


async def application(scope, receive, send):
  """Answers once it has the body."""
  while True:
    message = await receive()
    if message['type'] == 'http.disconnect':
      return
    if not message.get('more_body'):
      break
  await send({'type': 'http.response.start', 'status': 200, 'headers': [(b'content-length', b'2')]})
  await send({'type': 'http.response.body', 'body': b'ok'})


async def ask(reader, writer):
  """The lines of an answer's head; its body is read."""
  writer.write(REQUEST)
  head = await reader.readuntil(b'\r\n\r\n')
  assert await reader.readexactly(2) == b'ok'
  return head.lower().split(b'\r\n')


async def accepted(sock, application):
  """The transport and the protocol of a connection, without a server."""
  config = uvicorn.Config(application, lifespan='off', log_config=None, timeout_keep_alive=1)
  config.load()
  state, loop = uvicorn.server.ServerState(), asyncio.get_running_loop()
  return await loop.connect_accepted_socket(
    lambda: connections.Protocol(config=config, server_state=state, app_state={}, _loop=loop), sock
  )


@pytest.mark.parametrize('stalled', [0, 1, 2])
def test_a_stop_answers_all_that_has_arrived(monkeypatch, capsys, stalled):
  monkeypatch.setattr(connections, 'LONGEST_STOP', 1)
  monkeypatch.setattr(connections, 'LINGER', 0.5)

  async def live():
    listening = socket.create_server(('127.0.0.1', 0))
    port = listening.getsockname()[1]
    config = uvicorn.Config(application, http=connections.Protocol, lifespan='off', log_config=None)
    server = connections.Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    kept = [await asyncio.open_connection('127.0.0.1', port) for _ in range(3)]
    for one in kept:
      assert b'connection: close' not in await ask(*one)
    slow = [await asyncio.open_connection('127.0.0.1', port) for _ in range(stalled)]
    for _, writer in slow:
      writer.write(REQUEST[:-2])
    late = await asyncio.open_connection('127.0.0.1', port)
    late[1].write(REQUEST[:-4])
    await asyncio.sleep(0.1)
    server.should_exit = True
    waiting = [socket.create_connection(('127.0.0.1', port)) for _ in range(3)]  # Not accepted yet.
    while listening.fileno() >= 0:
      await asyncio.sleep(0.01)
    with pytest.raises(ConnectionRefusedError):
      await asyncio.open_connection('127.0.0.1', port)
    accepted = [await asyncio.open_connection(sock=sock) for sock in waiting]
    for one in kept + accepted:
      assert b'connection: close' in await ask(*one)
      assert await one[0].read() == b''  # Closed, not reset.
    late[1].write(b'body')
    assert b'connection: close' in (await late[0].readuntil(b'\r\n\r\n')).lower().split(b'\r\n')
    await serving
    for reader, _ in slow:
      with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    for _, writer in [*kept, *accepted, *slow, late]:
      writer.close()
      with contextlib.suppress(ConnectionError):
        await writer.wait_closed()

  asyncio.run(live())
  out, err = capsys.readouterr()
  count = {0: '', 1: '1 connection', 2: '2 connections'}[stalled]
  why = 'requests that had not arrived whole or were being worked on, or answers that were not read'
  line = f'cut {count} after 1 s: {why}\n'
  assert (out, err) == ('', line if stalled else '')


def test_connections_that_the_event_loop_has_not_accepted_yet_are_answered(monkeypatch):
  monkeypatch.setattr(connections, 'LINGER', 0.5)

  async def live():
    listening = socket.create_server(('127.0.0.1', 0))
    config = uvicorn.Config(application, http=connections.Protocol, lifespan='off', log_config=None)
    config.load()
    server = connections.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listening])
    waiting = [socket.create_connection(listening.getsockname()) for _ in range(3)]
    stopping = asyncio.create_task(server.shutdown([listening]))  # Runs before the event loop accepts them.
    for sock in waiting:
      reader, writer = await asyncio.open_connection(sock=sock)
      assert (await ask(reader, writer))[0] == b'http/1.1 200 ok'
      writer.close()
      await writer.wait_closed()
    await stopping

  asyncio.run(live())


@pytest.mark.parametrize(('sent', 'closed'), [(b'', True), (REQUEST, False)], ids=['idle', 'unread request'])
def test_a_connection_with_an_unread_request_is_not_idle(sent, closed):
  async def live():
    ours, theirs = socket.socketpair()
    config = uvicorn.Config(application, lifespan='off', log_config=None)
    config.load()
    state, loop = uvicorn.server.ServerState(), asyncio.get_running_loop()
    transport, protocol = await loop.connect_accepted_socket(
      lambda: connections.Protocol(config=config, server_state=state, app_state={}, _loop=loop), ours
    )
    theirs.send(sent)  # The event loop does not run before the handler does.
    protocol.timeout_keep_alive_handler()
    assert transport.is_closing() == closed
    if not closed:
      reader, writer = await asyncio.open_connection(sock=theirs)
      assert (await reader.readuntil(b'\r\n\r\n')).startswith(b'HTTP/1.1 200')
      writer.close()
    transport.abort()
    theirs.close()

  asyncio.run(live())


NEXT = {
  'after a request': (b'\x16\x03\x01\r\n\r\n', 1),
  'another request': (REQUEST, 2),
  'thousands that ask for another protocol': (UPGRADE * 2000, 2001),
  'half a head': (b'POST / HTTP/1.1\r\nX: ' + b'a' * 20_000, 1),
}


@pytest.mark.parametrize('name', NEXT)
def test_a_request_is_answered_whatever_follows_it(name):
  follows, answers = NEXT[name]

  async def live():
    ours, theirs = socket.socketpair()
    transport, _ = await accepted(ours, application)
    reader, writer = await asyncio.open_connection(sock=theirs)
    writer.write(REQUEST + follows)
    for _ in range(answers):
      assert (await reader.readuntil(b'\r\n\r\n')).startswith(b'HTTP/1.1 200')
      assert await reader.readexactly(2) == b'ok'
    if answers == 1:
      assert await reader.read() == b''
    transport.abort()
    writer.close()

  asyncio.run(live())


async def echo(scope, receive, send):
  """Answers with the body."""
  body, more = b'', True
  while more:
    message = await receive()
    body, more = body + message.get('body', b''), message.get('more_body', False)
  await send({'type': 'http.response.start', 'status': 200, 'headers': [(b'content-length', b'%d' % len(body))]})
  await send({'type': 'http.response.body', 'body': body})


CHUNKED = UPGRADE.replace(b'Content-Length: 4', b'Transfer-Encoding: chunked').replace(
  b'body', b'2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n'
)
NOTHING = UPGRADE.replace(b'Content-Length: 4', b'Content-Length: 0').removesuffix(b'body')


@pytest.mark.parametrize('step', [1, 60, 1000])
def test_a_request_that_asks_for_another_protocol_keeps_its_body(step):
  """As some clients ask for HTTP/2 in their first request, which is served by HTTP/1.1 all the same."""
  sent = UPGRADE + CHUNKED + NOTHING + REQUEST + UPGRADE

  async def live():
    ours, theirs = socket.socketpair()
    transport, protocol = await accepted(ours, echo)
    for start in range(0, len(sent), step):
      protocol.data_received(sent[start : start + step])
    reader, writer = await asyncio.open_connection(sock=theirs)
    for body in (b'body', b'body', b'', b'body', b'body'):
      assert (await reader.readuntil(b'\r\n\r\n')).startswith(b'HTTP/1.1 200')
      assert await reader.readexactly(len(body)) == body
    transport.abort()
    writer.close()

  asyncio.run(live())
