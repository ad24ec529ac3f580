"""A small Hugging Face Hub on this machine: what huggingface_hub asks for over HTTP, and a hub's faults."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as constants
import huggingface_hub.file_download as file_download

TOKEN = 'hf_test_token'


def git_hash(content: bytes) -> str:
  """What git calls a small file."""
  return hashlib.sha1(f'blob {len(content)}\0'.encode() + content).hexdigest()


class Hub:
  """The contents of the hub, and how it misbehaves.

  Attributes:
    repos: files by revision, by repository.
    private: repositories that need the token.
    gated: repositories whose terms have to be accepted.
    cut: bytes of a file after which the connection breaks, once, by file.
    altered: files that arrive with another content than their hash says.
    broken: status with which everything is answered; None: nothing is broken.
    requests: method, path and Range header of each request.
  """

  def __init__(self):
    self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
    self.private: set[str] = set()
    self.gated: set[str] = set()
    self.cut: dict[str, int] = {}
    self.altered: set[str] = set()
    self.broken: int | None = None
    self.requests: list[tuple[str, str, str | None]] = []
    self.uploaded: dict[str, bytes] = {}
    self.endpoint = ''

  def add(self, repo: str, files: dict[str, bytes], revision: str = 'main') -> None:
    """Adds a revision of a repository."""
    self.repos.setdefault(repo, {})[revision] = dict(files)

  def commit(self, repo: str, revision: str) -> str | None:
    """The hash of a revision, which is also a name for it; None: there is none."""
    for name, files in self.repos.get(repo, {}).items():
      commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
      if revision in (name, commit):
        return commit
    return None

  def files(self, repo: str, revision: str) -> dict[str, bytes]:
    """The files of a revision."""
    commit = self.commit(repo, revision)
    return next(files for name, files in self.repos[repo].items() if self.commit(repo, name) == commit)


def is_large(name: str) -> bool:
  """Whether a file is stored by its SHA-256, as large ones are."""
  return name.endswith(('.safetensors', '.bin', '.onnx', '.th'))


@contextlib.contextmanager
def running() -> Iterator[Hub]:
  """Starts a hub, at `Hub.endpoint`."""
  hub = Hub()
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': hub}))
  hub.endpoint = f'http://127.0.0.1:{server.server_port}'
  thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True)
  thread.start()
  try:
    yield hub
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


@contextlib.contextmanager
def used(folder: Path, monkeypatch: Any) -> Iterator[Hub]:
  """Starts a hub that huggingface_hub uses in this process, with its cache in a folder and without a token."""
  with running() as hub:
    settings = {'HF_HUB_CACHE': str(folder / 'cache'), 'HF_TOKEN_PATH': str(folder / 'token')}
    for name, value in settings.items():
      monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)  # Its storage is no plain HTTP.
    monkeypatch.setattr(file_download, 'time', types.SimpleNamespace(sleep=lambda _: None))
    monkeypatch.delenv('HF_TOKEN', raising=False)
    point_to(hub.endpoint, monkeypatch)
    yield hub


def point_to(endpoint: str, monkeypatch: Any) -> None:
  """Makes huggingface_hub use the hub at this address."""
  monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
  monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', endpoint + '/{repo_id}/resolve/{revision}/{filename}')


class _Handler(http.server.BaseHTTPRequestHandler):
  hub: Hub
  protocol_version = 'HTTP/1.1'
  wbufsize = -1  # Head and body in one packet: otherwise the second waits for a delayed acknowledgment.

  def log_message(self, *_: Any) -> None:
    """Prints nothing."""

  def do_GET(self) -> None:
    self._answer()

  def do_HEAD(self) -> None:
    self._answer()

  def do_POST(self) -> None:
    self._answer()

  def do_PUT(self) -> None:
    self._answer()

  def _answer(self) -> None:
    path = unquote(urlsplit(self.path).path)
    self.hub.requests.append((self.command, path, self.headers.get('Range')))
    self._body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    if self.hub.broken:
      self._send(self.hub.broken, b'{}')
      return
    for pattern, act in _ROUTES:
      found = re.fullmatch(pattern, f'{self.command} {path}')
      if found:
        act(self, **found.groupdict())
        return
    self._send(404, b'{}')

  @property
  def _known(self) -> bool:
    return self.headers.get('Authorization') == f'Bearer {TOKEN}'

  def _refused(self, repo: str, revision: str | None = None) -> bool:
    """Answers for a repository that is not there for this client."""
    hub = self.hub
    if repo not in hub.repos or (repo in hub.private and not self._known):
      self._send(401 if repo in hub.private or not self._known else 404, b'{}', {'X-Error-Code': 'RepoNotFound'})
    elif repo in hub.gated:
      self._send(403, b'{}', {'X-Error-Code': 'GatedRepo'})
    elif revision and hub.commit(repo, revision) is None:
      self._send(404, b'{}', {'X-Error-Code': 'RevisionNotFound'})
    else:
      return False
    return True

  def _tree(self, repo: str, revision: str) -> None:
    if self._refused(repo, revision):
      return
    entries = []
    for name, content in self.hub.files(repo, revision).items():
      entry: dict[str, Any] = {'type': 'file', 'path': name, 'size': len(content), 'oid': git_hash(content)}
      if is_large(name):
        entry['lfs'] = {'oid': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 130}
      entries.append(entry)
    self._json(entries)

  def _info(self, repo: str, revision: str = 'main') -> None:
    if self._refused(repo, revision):
      return
    siblings = [{'rfilename': name} for name in self.hub.files(repo, revision)]
    self._json({'id': repo, 'modelId': repo, 'sha': self.hub.commit(repo, revision), 'siblings': siblings})

  def _resolve(self, repo: str, revision: str, file: str) -> None:
    if self._refused(repo, revision):
      return
    files, commit = self.hub.files(repo, revision), self.hub.commit(repo, revision)
    if file not in files:
      self._send(404, b'', {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': str(commit)})
      return
    content = files[file]
    etag = hashlib.sha256(content).hexdigest() if is_large(file) else git_hash(content)
    if file in self.hub.altered:
      content = bytes([content[0] ^ 1]) + content[1:]
    headers = {'ETag': f'"{etag}"', 'X-Repo-Commit': str(commit), 'Accept-Ranges': 'bytes'}
    status, start = 200, 0
    if found := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or ''):
      status, start = 206, int(found[1])
      headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
    if self.command == 'GET' and not start and (size := self.hub.cut.pop(file, None)):
      self._send(status, content[:size], headers | {'Content-Length': str(len(content))})
      self.wfile.flush()
      self.close_connection = True
      return
    self._send(status, content[start:], headers)

  def _whoami(self) -> None:
    if self._known:
      self._json({'name': 'me', 'type': 'user', 'orgs': []})
    else:
      self._send(401, b'{"error": "Invalid user token"}')

  def _create(self) -> None:
    if not self._known:
      self._send(401, b'{}')
      return
    asked = json.loads(self._body)
    repo = f'{asked["organization"]}/{asked["name"]}'
    if repo in self.hub.repos:
      self._json({'url': f'{self.hub.endpoint}/{repo}'}, 409)
      return
    self.hub.add(repo, {})
    self._json({'url': f'{self.hub.endpoint}/{repo}', 'id': repo})

  def _branch(self, repo: str, branch: str) -> None:
    self.hub.repos[repo].setdefault(branch, dict(self.hub.repos[repo]['main']))
    self._json({})

  def _valid(self) -> None:
    self._json({'errors': [], 'warnings': []})

  def _preupload(self, repo: str, revision: str) -> None:
    if self._refused(repo, revision):
      return
    names = [file['path'] for file in json.loads(self._body)['files']]
    modes = [
      {'path': name, 'uploadMode': 'lfs' if is_large(name) else 'regular', 'shouldIgnore': False} for name in names
    ]
    self._json({'files': modes})

  def _batch(self, repo: str) -> None:
    asked = json.loads(self._body)['objects']
    place = f'{self.hub.endpoint}/storage'
    self._json(
      {
        'transfer': 'basic',
        'objects': [each | {'actions': {'upload': {'href': f'{place}/{each["oid"]}'}}} for each in asked],
      }
    )

  def _store(self, oid: str) -> None:
    assert hashlib.sha256(self._body).hexdigest() == oid
    self.hub.uploaded[oid] = self._body
    self._send(200, b'')

  def _commit(self, repo: str, revision: str) -> None:
    if self._refused(repo, revision):
      return
    files = self.hub.repos[repo][revision]
    for line in self._body.splitlines():
      entry = json.loads(line)
      value = entry['value']
      if entry['key'] == 'file':
        files[value['path']] = base64.b64decode(value['content'])
      elif entry['key'] == 'lfsFile':
        files[value['path']] = self.hub.uploaded[value['oid']]
    commit = self.hub.commit(repo, revision)
    self._json({'commitUrl': f'{self.hub.endpoint}/{repo}/commit/{commit}', 'commitOid': commit})

  def _json(self, value: Any, status: int = 200) -> None:
    self._send(status, json.dumps(value).encode(), {'Content-Type': 'application/json'})

  def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    self.send_response(status)
    for name, value in ({'Content-Length': str(len(body))} | (headers or {})).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)


_REPO = r'(?P<repo>[\w.-]+/[\w.-]+)'
_ROUTES = (
  (rf'GET /api/models/{_REPO}/tree/(?P<revision>.+?)', _Handler._tree),
  (rf'GET /api/models/{_REPO}/revision/(?P<revision>.+)', _Handler._info),
  (rf'GET /api/models/{_REPO}', _Handler._info),
  (r'GET /api/whoami-v2', _Handler._whoami),
  (r'POST /api/repos/create', _Handler._create),
  (r'POST /api/validate-yaml', _Handler._valid),
  (rf'POST /api/models/{_REPO}/branch/(?P<branch>.+)', _Handler._branch),
  (rf'POST /api/models/{_REPO}/preupload/(?P<revision>.+)', _Handler._preupload),
  (rf'POST /api/models/{_REPO}/commit/(?P<revision>.+)', _Handler._commit),
  (rf'POST /{_REPO}\.git/info/lfs/objects/batch', _Handler._batch),
  (r'PUT /storage/(?P<oid>[0-9a-f]+)', _Handler._store),
  (rf'(GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)', _Handler._resolve),
)
