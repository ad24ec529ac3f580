"""The page of a bundle: index.html, and the files of onnxruntime-web with which it runs the stages in a browser."""

import hashlib
import http.client
import io
import shutil
import tarfile
import urllib.request
from pathlib import Path

from paranet_jax.host.arguments import cache_folder
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.files import read_file, replacing

VERSION = '1.30.0'
ARCHIVE = f'onnxruntime-web-{VERSION}.tgz'
ADDRESS = f'https://registry.npmjs.org/onnxruntime-web/-/{ARCHIVE}'
SHA256 = 'd2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71'
"""Of the archive. Change it together with VERSION."""
FOLDER = 'onnxruntime-web'
MEMBERS = (
  *('ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm'),
  *('ort.webgpu.bundle.min.mjs', 'ort-wasm-simd-threaded.asyncify.wasm'),
)
"""What a browser loads for the processor, and for WebGPU."""

_PAGE = Path(__file__).with_name('page')
_TIMEOUT = 30  # Seconds without an answer.


def page_library(archive: Path | None = None) -> bytes:
  """The archive of onnxruntime-web's npm package: a file, or the one in the cache, where it is downloaded to once.

  Args:
    archive: None: in PARANET_CACHE_DIR.

  Raises:
    UserError: it is not that version, byte for byte, or cannot be read or downloaded.
  """
  if archive:
    content = read_file(archive, 'set --web-runtime')
    if content is None:
      raise UserError(f'expected {archive}, found none; npm pack onnxruntime-web@{VERSION} downloads it')
    return _checked(content, str(archive), f'npm pack onnxruntime-web@{VERSION} downloads the right one')
  cached = cache_folder() / 'web' / ARCHIVE
  content = read_file(cached, 'remove it, or set PARANET_CACHE_DIR')
  if content is None or hashlib.sha256(content).hexdigest() != SHA256:
    content = _checked(_downloaded(), ADDRESS, 'a proxy may have changed it: set --web-runtime to an intact copy')
    cached.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cached, 'wb') as file:
      file.write(content)
  return content


def _checked(content: bytes, where: str, fix: str) -> bytes:
  found = hashlib.sha256(content).hexdigest()
  if found != SHA256:
    raise UserError(f'expected onnxruntime-web {VERSION} of sha256 {SHA256:.12}, found {found:.12} in {where}; {fix}')
  return content


def _downloaded() -> bytes:
  say(f'downloading onnxruntime-web {VERSION} from {ADDRESS}')
  try:
    with urllib.request.urlopen(ADDRESS, timeout=_TIMEOUT) as answer:
      return answer.read()
  except (OSError, http.client.HTTPException) as error:
    reason = ' '.join(str(getattr(error, 'reason', error)).split()) or type(error).__name__
    raise UserError(
      f'{ADDRESS} cannot be downloaded ({reason}); run npm pack onnxruntime-web@{VERSION} where there is a network, '
      f'and set --web-runtime={ARCHIVE}'
    ) from error


def write_page(folder: Path, library: bytes) -> dict[str, str]:
  """Writes index.html and the folder `onnxruntime-web`; returns the version of the latter.

  Args:
    library: see `page_library`.
  """
  shutil.copyfile(_PAGE / 'index.html', folder / 'index.html')
  (folder / FOLDER).mkdir()
  shutil.copyfile(_PAGE / 'LICENSE.onnxruntime-web', folder / FOLDER / 'LICENSE')
  with tarfile.open(fileobj=io.BytesIO(library), mode='r:gz') as archive:
    for name in MEMBERS:
      member = archive.extractfile(f'package/dist/{name}')
      assert member is not None  # The hash says which files there are.
      (folder / FOLDER / name).write_bytes(member.read())
  return {FOLDER: VERSION}
