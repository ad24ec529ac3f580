"""A headless Chromium: opens pages, evaluates JavaScript, chooses files and takes pictures.

It is driven by the DevTools protocol over two pipes, so no package and no port is needed.
"""

import base64
import contextlib
import functools
import http.server
import json
import os
import select
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
MISSING = 'needs Chromium: apt install chromium'
_FLAGS = (
  *('--headless=new', '--no-sandbox', '--remote-debugging-pipe', '--no-first-run', '--disable-background-networking'),
  *('--disable-component-update', '--hide-scrollbars', '--use-fake-device-for-media-stream'),
  *('--use-fake-ui-for-media-stream', '--disable-dev-shm-usage'),
)


class Page:
  """A tab.

  Attributes:
    errors: what it wrote on the console as an error, and exceptions.
    requests: the addresses that it asked for.
  """

  def __init__(self, send: int, receive: int):
    self.errors: list[str] = []
    self.requests: list[str] = []
    self._send, self._receive, self._buffer, self._number = send, receive, b'', 0
    self._session: str | None = None
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network', 'DOM'):
      self.call(f'{domain}.enable')

  def call(self, method: str, **params):
    """Calls a method of the DevTools protocol and returns its result."""
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params}
    message |= {'sessionId': self._session} if self._session else {}
    os.write(self._send, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._read()
      if answer.get('id') == self._number:
        assert 'error' not in answer, answer
        return answer['result']

  def open(self, address: str) -> None:
    """Loads a page."""
    self.call('Page.navigate', url=address)
    self.wait(f'location.href === {json.dumps(address)} && document.readyState === "complete"')

  def value(self, expression: str):
    """The value of an expression, awaited if it is a promise."""
    answer = self.call('Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True)
    assert 'exceptionDetails' not in answer, answer['exceptionDetails']
    return answer['result'].get('value')

  def wait(self, expression: str, seconds: float = 60) -> None:
    """Waits until an expression is true."""
    until = time.monotonic() + seconds
    while not self.value(f'Boolean({expression})'):
      assert time.monotonic() < until, f'{expression} is still false; errors: {self.errors}; page: {self.text()}'
      time.sleep(0.02)

  def text(self) -> str:
    """What a user reads."""
    return self.value('document.body.innerText')

  def choose(self, selector: str, files: list[Path]) -> None:
    """Chooses files in an input."""
    root = self.call('DOM.getDocument')['root']['nodeId']
    node = self.call('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
    self.call('DOM.setFileInputFiles', nodeId=node, files=[str(file) for file in files])

  def press(self, key: str, code: int) -> None:
    """Presses a key, such as ('Tab', 9)."""
    for kind in ('rawKeyDown', 'keyUp'):
      self.call('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code)

  def resize(self, width: int, height: int = 900, dark: bool = False, scale: float = 1) -> None:
    """Sets the size of the window in CSS pixels, and the preferred colors."""
    self.call(
      'Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=scale, mobile=width < 500
    )
    features = [{'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}]
    self.call('Emulation.setEmulatedMedia', features=features)

  def picture(self, path: Path, whole: bool = True) -> None:
    """Writes a PNG of the page: all of it, or of the window."""
    data = self.call('Page.captureScreenshot', format='png', captureBeyondViewport=whole)['data']
    path.write_bytes(base64.b64decode(data))

  def _read(self) -> dict:
    while b'\0' not in self._buffer:
      ready, _, _ = select.select([self._receive], [], [], 120)
      part = os.read(self._receive, 2**20) if ready else b''
      assert part, 'the browser does not answer'
      self._buffer += part
    line, _, self._buffer = self._buffer.partition(b'\0')
    message = json.loads(line)
    method, params = message.get('method'), message.get('params', {})
    if method == 'Runtime.exceptionThrown':
      self.errors.append(params['exceptionDetails'].get('exception', {}).get('description', str(params)))
    elif method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'assert'):
      self.errors.append(' '.join(str(value.get('value', value.get('description'))) for value in params['args']))
    elif method == 'Log.entryAdded' and params['entry']['level'] == 'error':
      self.errors.append(f'{params["entry"]["text"]} {params["entry"].get("url", "")}')
    elif method == 'Network.requestWillBeSent':
      self.requests.append(params['request']['url'])
    return message


@contextlib.contextmanager
def opened(*flags: str) -> Iterator[Page]:
  """A tab of a new browser."""
  assert CHROMIUM, MISSING
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = [CHROMIUM, *_FLAGS, *flags, f'--user-data-dir={profile}']
    # Chromium reads commands from descriptor 3, and writes answers to 4.
    shell = ['bash', '-c', f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', 'bash', *command]
    process = subprocess.Popen(shell, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
      yield Page(ours_out, ours_in)
    finally:
      os.close(ours_out)  # It ends when nothing can command it any more.
      try:
        process.wait(10)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
      os.close(ours_in)


@contextlib.contextmanager
def served(folder: Path, **headers: str) -> Iterator[str]:
  """The address of a folder, served as `python -m http.server` does, with more headers (`_` stands for `-`)."""

  class Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
      for name, value in headers.items():
        self.send_header(name.replace('_', '-'), value)
      super().end_headers()

    def log_message(self, *_) -> None:
      pass

  handler = functools.partial(Handler, directory=str(folder))
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      yield f'http://127.0.0.1:{server.server_port}'
    finally:
      server.shutdown()
