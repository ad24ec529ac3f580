"""The page of a bundle: its library is the pinned one or refused, its files are sealed, and it is well-formed.

tests/slow/web_test.py uses it in a browser.
"""

import hashlib
import io
import json
import re
import shutil
import tarfile
import urllib.error

import pytest
import tiny_bundle
from markup import Structure

from paranet_jax.export import bundle as bundle_lib
from paranet_jax.export import web
from paranet_jax.host.errors import UserError
from paranet_jax.portable import run

PAGE = (web._PAGE / 'index.html').read_text()


@pytest.fixture
def archive(monkeypatch):
  """A stand-in for the archive of the library, whose hash is the expected one."""
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode='w:gz') as packed:
    for name in (*web.MEMBERS, 'ort.js'):
      entry = tarfile.TarInfo(f'package/dist/{name}')
      entry.size = len(name)
      packed.addfile(entry, io.BytesIO(name.encode()))
  monkeypatch.setattr(web, 'SHA256', hashlib.sha256(content.getvalue()).hexdigest())
  return content.getvalue()


@pytest.fixture
def host(archive, tmp_path, monkeypatch):
  """npm's registry: what it answers (bytes, or an error), and which addresses it was asked for."""
  asked, answer = [], [archive]

  def urlopen(address, timeout):
    asked.append(address)
    if isinstance(answer[0], Exception):
      raise answer[0]
    return io.BytesIO(answer[0])

  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path / 'cache'))
  monkeypatch.setattr(web.urllib.request, 'urlopen', urlopen)
  return answer, asked


def test_the_library_is_downloaded_once(archive, host, tmp_path):
  _, asked = host
  cached = tmp_path / 'cache/web/onnxruntime-web-1.30.0.tgz'
  assert web.page_library() == web.page_library() == cached.read_bytes() == archive
  assert asked == ['https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz']
  cached.write_bytes(archive[:50])  # Damaged since.
  assert web.page_library() == cached.read_bytes() == archive
  assert len(asked) == 2


@pytest.mark.parametrize(
  'answer, message',
  [
    (urllib.error.URLError('Name or service not known'), ' cannot be downloaded (Name or service not known); {fix}'),
    (TimeoutError(), ' cannot be downloaded (TimeoutError); {fix}'),
    (
      web.http.client.IncompleteRead(b'x', 9),
      ' cannot be downloaded (IncompleteRead(1 bytes read, 9 more expected)); {fix}',
    ),
  ],
)
def test_without_a_network(host, tmp_path, answer, message):
  host[0][0] = answer
  with pytest.raises(UserError) as error:
    web.page_library()
  fix = 'run npm pack onnxruntime-web@1.30.0 where there is a network, and set --web-runtime=onnxruntime-web-1.30.0.tgz'
  assert str(error.value) == web.ADDRESS + message.format(fix=fix)
  assert not (tmp_path / 'cache').exists()


def test_another_library_is_refused(archive, host, tmp_path):
  host[0][0] = archive + b'x'
  found = hashlib.sha256(archive + b'x').hexdigest()[:12]
  line = f'expected onnxruntime-web 1.30.0 of sha256 {web.SHA256:.12}, found {found} in'
  with pytest.raises(UserError) as error:
    web.page_library()
  fix = 'a proxy may have changed it: set --web-runtime to an intact copy'
  assert str(error.value) == f'{line} {web.ADDRESS}; {fix}'
  given = tmp_path / 'own.tgz'
  given.write_bytes(archive + b'x')
  with pytest.raises(UserError) as error:
    web.page_library(given)
  assert str(error.value) == f'{line} {given}; npm pack onnxruntime-web@1.30.0 downloads the right one'
  given.unlink()
  with pytest.raises(UserError) as error:
    web.page_library(given)
  assert str(error.value) == f'expected {given}, found none; npm pack onnxruntime-web@1.30.0 downloads it'
  given.write_bytes(archive)
  assert web.page_library(given) == archive and len(host[1]) == 1
  assert not (tmp_path / 'cache').exists()


def test_files_of_the_page(archive, tmp_path):
  folder = tiny_bundle.write(tmp_path / 'bundle')
  before = bundle_lib._checksums(folder)
  assert web.write_page(folder, archive) == {'onnxruntime-web': '1.30.0'}
  added = {'index.html', *(f'onnxruntime-web/{name}' for name in (*web.MEMBERS, 'LICENSE'))}
  sums = bundle_lib._checksums(folder)
  assert set(sums) - set(before) == added and sums.items() >= before.items()
  assert (folder / 'index.html').read_text() == PAGE
  assert (folder / 'onnxruntime-web' / web.MEMBERS[1]).read_text() == web.MEMBERS[1]
  facts = json.loads((folder / run.BUNDLE).read_text())
  (folder / run.BUNDLE).write_text(json.dumps(facts | {'checksums': sums}))
  assert run.load(folder).exits == (1, 2, 3)  # run.py does not mind.
  shutil.rmtree(folder / 'onnxruntime-web')
  assert run.load(folder).exits == (1, 2, 3)


def test_the_page_is_well_formed():
  page = Structure(PAGE)
  assert len(set(page.ids)) == len(page.ids)
  used = re.findall(r"\$\('([\w-]+)'\)", PAGE)
  assert len(used) > 30 and {*used, *page.references} <= set(page.ids)
  assert page.links == ['data:,']  # Nothing is loaded from elsewhere.
  assert set(re.findall(r'https?://[^\s"\'<>:]+', PAGE)) == {'http://localhost'}
  assert all(name in PAGE for name in web.MEMBERS if name.endswith('.mjs'))


def test_the_page_has_the_numbers_of_run():
  for name, value in (
    ('SCHEMA_VERSION', run.SCHEMA_VERSION),
    ('MAX_PIXELS', run.MAX_PIXELS),
    ('LONGEST', run._LONGEST),
  ):
    assert f'{name} = {value},' in PAGE
  assert run.BACKGROUND == (255, 255, 255) and "fillStyle = 'white'" in PAGE
  assert all(f'{name}: [' in PAGE for name in run.INTERPOLATIONS)
