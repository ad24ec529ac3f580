"""Files from the Hugging Face Hub and back: `hf:OWNER/NAME`, `hf:OWNER/NAME@REVISION`, `hf:OWNER/NAME:FILE`.

huggingface_hub does the transfer, so its cache, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN` and `hf auth login` hold.
What it does not do, comparing what arrived with its hash, is done here.
"""

import contextlib
import hashlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from paranet_jax.host.errors import UserError

PREFIX = 'hf:'
SAFETENSORS, PICKLED = '.safetensors', ('.bin', '.pth', '.pt', '.th')
"""Suffixes of files of weights."""

_FORM = re.compile(r'hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@:\s]+))?(:(?P<file>[^:\s]+))?')
_SHOWN = 5
_CHUNK = 2**20


class HubPlace(NamedTuple):
  """A place on the hub.

  Attributes:
    repo: OWNER/NAME.
    revision: branch, tag or commit; None: the default branch.
    file: path in the repository; None: to be found.
  """

  repo: str
  revision: str | None = None
  file: str | None = None

  def __str__(self) -> str:
    revision, file = (mark + part if part else '' for mark, part in (('@', self.revision), (':', self.file)))
    return f'{PREFIX}{self.repo}{revision}{file}'


def is_hub(text: str) -> bool:
  """Whether a text names a place on the hub, and no path of this machine."""
  return text.startswith(PREFIX)


def hub_place(text: str, flag: str, folder: bool = False) -> HubPlace:
  """Reads the name of a place.

  Args:
    flag: the one to set, for messages.
    folder: a file must not be named.

  Raises:
    UserError: it has another form.
  """
  found = _FORM.fullmatch(text)
  if not found or (folder and found['file']):
    form = 'hf:OWNER/NAME or hf:OWNER/NAME@REVISION' + ('' if folder else ', and :FILE after either')
    raise UserError(f'expected {form}, found {text!a:.80}; set {flag}')
  return HubPlace(found['repo'], found['revision'], found['file'])


def download_weights(place: HubPlace, flag: str) -> Path:
  """Downloads a file of weights, unless the cache has it.

  The file is `place.file`, or the repository's `model.safetensors`, its only `.safetensors`, `pytorch_model.bin`, or
  its only other file of weights, in this order.

  Args:
    flag: the one that names the place, for messages.

  Raises:
    UserError: huggingface_hub is not installed, there is no such repository or file, several may be meant, it cannot be
      downloaded, or its content does not have its hash.
  """
  hub = _library()
  file = place.file
  if file is None:
    names = _names(hub, place)
    weights = [name for name in names if name.endswith((SAFETENSORS, *PICKLED))]
    safe = [name for name in weights if name.endswith(SAFETENSORS)]
    for name, only in (('model.safetensors', safe), ('pytorch_model.bin', weights if not safe else [])):
      if name in only or len(only) == 1:
        file = name if name in only else only[0]
        break
    else:
      raise UserError(
        f'expected one file of weights in {place}, found {_listed(safe or weights or names)}; '
        + (f'set {flag}={place}:FILE to one of them' if weights else f'set {flag} to another repository')
      )
  return _download(hub, place, file)


def download_files(place: HubPlace, wanted: Collection[str], prefixes: tuple[str, ...] = ()) -> Path:
  """Downloads some files of a repository, as far as it has them, and returns their folder, which is read-only.

  Args:
    wanted: paths in the repository.
    prefixes: of other paths that are wanted.

  Raises:
    UserError: as `download_weights`, but for the choice of a file; or the repository has none of the files.
  """
  hub = _library()
  names = [name for name in _names(hub, place) if name in wanted or name.startswith(prefixes or ('\0',))]
  if not names:
    raise UserError(f'expected {_listed(list(wanted))} in {place}, found none of these; name another repository')
  folder = None
  for name in names:
    file = _download(hub, place, name)
    folder = file.parents[name.count('/')]
    place = place._replace(revision=folder.name)  # Its commit, also if another one is pushed meanwhile.
  assert folder
  return folder


def check_upload(place: HubPlace, flag: str) -> None:
  """Checks, before anything slow, that there is an account to upload with.

  Raises:
    UserError: huggingface_hub is not installed, the hub is out of reach, or the token is missing or refused.
  """
  hub = _library()
  if hub.constants.is_offline_mode():
    raise UserError(f'{place} cannot be written while HF_HUB_OFFLINE is set; unset it, or leave out {flag}')
  if not hub.get_token():
    raise UserError(f'{place} is written with a token of the hub, found none; run hf auth login, or set HF_TOKEN')
  with _one_line(hub, place, otherwise=''):
    hub.HfApi().whoami()


def upload_folder(folder: Path, place: HubPlace) -> str:
  """Writes the files of a folder to a repository, as one more commit; it is made if it does not exist.

  Returns:
    The address of the commit.

  Raises:
    UserError: it cannot be written; the folder stays.
  """
  hub = _library()
  api = hub.HfApi()
  try:
    with _one_line(hub, place, otherwise=''):
      api.create_repo(place.repo, exist_ok=True)
      if place.revision:
        api.create_branch(place.repo, branch=place.revision, exist_ok=True)
      message = f'Upload {folder.name}, written by paranet_jax'
      commit = api.upload_folder(
        repo_id=place.repo, folder_path=folder, revision=place.revision, commit_message=message
      )
  except UserError as error:
    command = f'hf upload {place.repo} {shlex.quote(str(folder))}'
    command += f' --revision={shlex.quote(place.revision)}' if place.revision else ''
    raise error.saying(f'{error}; {folder} is complete, and {command} sends it') from error
  return str(commit.commit_url)


def _library() -> Any:
  try:
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors
    import huggingface_hub.utils
  except ImportError as error:
    raise UserError(f'{PREFIX} needs huggingface_hub, found none; pip install huggingface_hub') from error
  logging.getLogger('huggingface_hub').propagate = False  # It has a handler: its lines would be printed twice.
  if not sys.stderr or not sys.stderr.isatty():
    huggingface_hub.utils.disable_progress_bars()
  return huggingface_hub


def _names(hub: Any, place: HubPlace) -> list[str]:
  """The files of a repository; those in the cache if the hub is out of reach."""
  if hub.constants.is_offline_mode():
    if names := _cached_names(hub, place):
      return names
    raise UserError(_not_cached(hub, place))
  try:
    with _one_line(hub, place):
      # `list_repo_files` would try for half a minute to reach a hub that is out of reach.
      found = hub.HfApi().model_info(place.repo, revision=place.revision)
      return sorted(file.rfilename for file in found.siblings or ())
  except _UnreachableError:
    if names := _cached_names(hub, place):
      return names
    raise


def _cached_names(hub: Any, place: HubPlace) -> list[str]:
  revision = place.revision or hub.constants.DEFAULT_REVISION
  with contextlib.suppress(hub.CacheNotFound):
    for repo in hub.scan_cache_dir(hub.constants.HF_HUB_CACHE).repos:
      for found in repo.revisions if (repo.repo_id, repo.repo_type) == (place.repo, 'model') else ():
        if revision in found.refs or found.commit_hash == revision:
          return sorted(file.file_path.relative_to(found.snapshot_path).as_posix() for file in found.files)
  return []


def _download(hub: Any, place: HubPlace, file: str) -> Path:
  with _one_line(hub, place, file):
    path = Path(hub.hf_hub_download(place.repo, file, revision=place.revision))
  blob = Path(os.path.realpath(path))
  if (expected := _hash_of(blob.name)) and expected[1] != _content_hash(blob, expected[0]):
    raise UserError(
      f'{file} of {place._replace(file=None)} does not have its {expected[0]}, {expected[1]}, so it is damaged; delete '
      f'{blob}, and the same command downloads it again'
    )
  return path


def _hash_of(name: str) -> tuple[str, str] | None:
  """Kind and value of the hash that the cache names a file by; None: another name, such as without symbolic links."""
  kind = {64: 'SHA-256', 40: 'Git hash'}.get(len(name))
  return (kind, name) if kind and re.fullmatch('[0-9a-f]+', name) else None


def _content_hash(path: Path, kind: str) -> str:
  digest = hashlib.sha256()
  if kind == 'Git hash':
    digest = hashlib.sha1(f'blob {path.stat().st_size}\0'.encode(), usedforsecurity=False)
  with path.open('rb') as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


class _UnreachableError(UserError):
  """The hub does not answer."""


@contextlib.contextmanager
def _one_line(
  hub: Any, place: HubPlace, file: str | None = None, otherwise: str = ', or download the file and name it instead'
) -> Iterator[None]:
  """Turns what huggingface_hub raises into a `UserError`.

  Args:
    file: what is downloaded.
    otherwise: what else there is to do about a hub that does not answer.
  """
  errors, endpoint = hub.errors, hub.constants.ENDPOINT
  try:
    yield
  except Exception as error:  # It raises nearly anything, HTTP clients' own exceptions among them.
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    repo = f'{PREFIX}{place.repo}'
    if isinstance(error, errors.GatedRepoError):
      text = f'{repo} is open to those who accepted its terms; accept them at {endpoint}/{place.repo}, and log in'
    elif isinstance(error, errors.RevisionNotFoundError):
      text = f'expected a revision {place.revision} of {repo}, found none; name another one'
    elif isinstance(error, errors.RemoteEntryNotFoundError):
      text = f'expected a file {file} in {place._replace(file=None)}, found none; name another one'
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
      text = (
        f'expected a repository {repo} at {endpoint} that this account may use, found none (status {status}); check '
        'its name, and run hf auth login or set HF_TOKEN if it is private'
      )
    elif isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError) and (
      hub.constants.is_offline_mode()
    ):
      text = _not_cached(hub, place._replace(file=file))
    elif status is not None:
      text = f'{endpoint} answers {status} for {place}; try again later{otherwise}'
    elif isinstance(error, errors.LocalEntryNotFoundError) or type(error).__name__ in (
      'ConnectError', 'ConnectTimeout', 'ReadTimeout', 'RemoteProtocolError', 'ReadError', 'ProxyError'
    ):  # fmt: skip
      reason = error.__cause__ or error
      raise _UnreachableError(
        f'{endpoint} cannot be reached for {place} ({_first_line(reason)}); check the network and HF_ENDPOINT'
        + otherwise
      ) from error
    else:
      reason = ': '.join(map(_first_line, filter(None, (error, error.__cause__))))
      text = f'{place} cannot be used ({reason}); try again{otherwise}'
    raise UserError(text) from error


def _not_cached(hub: Any, place: HubPlace) -> str:
  return f'expected {place} in {hub.constants.HF_HUB_CACHE}, as HF_HUB_OFFLINE is set, found none; unset it'


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:200]


def _listed(names: list[str]) -> str:
  if not names:
    return 'no file'
  return ', '.join(names[:_SHOWN]) + (f', ... ({len(names)} files)' if len(names) > _SHOWN else '')
