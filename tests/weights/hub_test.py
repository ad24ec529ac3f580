"""Tests of `hf:OWNER/NAME` against a hub on this machine."""

import logging
import os
import subprocess
import sys

import hub_server
import huggingface_hub
import huggingface_hub.constants as constants
import pytest
from hub_server import TOKEN

from paranet_jax.host.errors import UserError
from paranet_jax.weights.hub import (
  HubPlace,
  check_upload,
  download_files,
  download_weights,
  hub_place,
  is_hub,
  upload_folder,
)

REPO = 'me/net'
PLACE = HubPlace(REPO)
WEIGHTS = bytes(range(256)) * 4000  # A megabyte, more than one read.
FLAG = '--weights'


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A hub with one repository."""
  with hub_server.used(tmp_path, monkeypatch) as hub:
    hub.add(REPO, {'README.md': b'read', 'model.safetensors': WEIGHTS})
    yield hub


@pytest.mark.parametrize(
  ('text', 'place'),
  [
    ('hf:me/net', HubPlace('me/net')),
    ('hf:me/net@v1.0', HubPlace('me/net', 'v1.0')),
    ('hf:me/net@refs/pr/3:a/b.safetensors', HubPlace('me/net', 'refs/pr/3', 'a/b.safetensors')),
    ('hf:me/net:b.pth', HubPlace('me/net', None, 'b.pth')),
  ],
)
def test_names_of_places(text, place):
  assert is_hub(text) and hub_place(text, FLAG) == place and str(place) == text


@pytest.mark.parametrize('text', ['hf:', 'hf:net', 'hf:a/b/c', 'hf:a/b@', 'hf:a/b:', 'hf:a/b@c:d:e', 'hf:a/b c'])
def test_other_forms_are_refused(text):
  with pytest.raises(UserError, match='expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION, and :FILE .*set --weights'):
    hub_place(text, FLAG)
  with pytest.raises(UserError, match='expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION, found .*set --push-to'):
    hub_place('hf:me/net:file', '--push-to', folder=True)


def refusal(place=PLACE):
  with pytest.raises(UserError) as error:
    download_weights(place, FLAG)
  assert '\n' not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(
  ('files', 'chosen'),
  [
    (['a.safetensors', 'model.safetensors', 'pytorch_model.bin'], 'model.safetensors'),
    (['sub/own.safetensors', 'pytorch_model.bin', 'x.th'], 'sub/own.safetensors'),
    (['pytorch_model.bin', 'training_args.bin'], 'pytorch_model.bin'),
    (['config.json', 'resnet56.th'], 'resnet56.th'),
  ],
)
def test_which_file_is_taken(hub, files, chosen):
  hub.add(REPO, {name: name.encode() for name in files})
  path = download_weights(PLACE, FLAG)
  assert path.read_bytes() == chosen.encode() and path.as_posix().endswith(chosen)


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    (
      ['b-1.safetensors', 'b-2.safetensors'],
      'expected one file of weights in hf:me/net, found b-1.safetensors, b-2.safetensors; '
      'set --weights=hf:me/net:FILE to one of them',
    ),
    (
      [f'{i}.pth' for i in range(7)],
      'expected one file of weights in hf:me/net, found 0.pth, 1.pth, 2.pth, 3.pth, 4.pth, ... (7 files); '
      'set --weights=hf:me/net:FILE to one of them',
    ),
    (['a.txt'], 'expected one file of weights in hf:me/net, found a.txt; set --weights to another repository'),
    ([], 'expected one file of weights in hf:me/net, found no file; set --weights to another repository'),
  ],
)
def test_no_file_or_several_are_refused(hub, files, message):
  hub.add(REPO, dict.fromkeys(files, b'x'))
  assert refusal() == message


def test_a_file_and_a_revision_by_name_and_from_the_cache(hub):
  hub.add(REPO, {'a.th': b'old', 'b.th': b'other'}, 'v1')
  place = HubPlace(REPO, 'v1', 'a.th')
  assert download_weights(place, FLAG).read_bytes() == b'old'
  hub.requests.clear()
  download_weights(place, FLAG)
  assert [method for method, *_ in hub.requests] == ['HEAD']  # Only asks whether it is the same.


def test_a_broken_download_resumes(hub, monkeypatch):
  monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 100_000)  # What is kept of a broken download: whole chunks.
  hub.cut['model.safetensors'] = 300_000
  assert download_weights(PLACE, FLAG).read_bytes() == WEIGHTS
  gets = [span for method, path, span in hub.requests if method == 'GET' and 'resolve' in path]
  assert gets == [None, 'bytes=300000-']


@pytest.mark.parametrize(('name', 'kind'), [('model.safetensors', 'SHA-256'), ('weights.pt', 'Git hash')])
def test_a_wrong_hash(hub, name, kind):
  hub.add(REPO, {name: WEIGHTS})
  hub.altered.add(name)
  message = refusal()
  assert (
    message.startswith(f'{name} of hf:me/net does not have its {kind}, ') and 'so it is damaged; delete ' in message
  )
  hub.altered.clear()
  os.unlink(message.partition('delete ')[2].partition(',')[0])
  assert download_weights(PLACE, FLAG).read_bytes() == WEIGHTS


def test_what_the_hub_refuses(hub, monkeypatch):
  assert refusal(HubPlace('me/none')) == (
    f'expected a repository hf:me/none at {hub.endpoint} that this account may use, found none (status 401); check its '
    'name, and run hf auth login or set HF_TOKEN if it is private'
  )
  hub.private.add(REPO)
  assert '(status 401)' in refusal()
  monkeypatch.setenv('HF_TOKEN', TOKEN)
  assert download_weights(PLACE, FLAG).read_bytes() == WEIGHTS
  assert '(status 404)' in refusal(HubPlace('me/none'))
  assert refusal(HubPlace(REPO, 'v9')) == 'expected a revision v9 of hf:me/net, found none; name another one'
  assert (
    refusal(HubPlace(REPO, 'main', 'x.pth')) == 'expected a file x.pth in hf:me/net@main, found none; name another one'
  )
  hub.gated.add(REPO)
  assert refusal().startswith(
    f'hf:me/net is open to those who accepted its terms; accept them at {hub.endpoint}/me/net'
  )
  hub.broken = 418
  assert (
    refusal() == f'{hub.endpoint} answers 418 for hf:me/net; try again later, or download the file and name it instead'
  )


def test_an_error_that_is_not_known(hub, monkeypatch):
  def fails(*_, **__):
    raise ValueError('no token\nand more') from OSError('the disk')

  monkeypatch.setattr(huggingface_hub.HfApi, 'model_info', fails)
  monkeypatch.setattr(huggingface_hub.HfApi, 'list_repo_files', fails)
  assert refusal() == (
    'hf:me/net cannot be used (no token: the disk); try again, or download the file and name it instead'
  )


def test_offline_the_cache_serves(hub, monkeypatch):
  hub.add(REPO, {'other.th': b'v1'}, 'v1')
  path = download_weights(PLACE, FLAG)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  hub.requests.clear()
  assert download_weights(PLACE, FLAG) == path
  assert download_weights(HubPlace(REPO, path.parent.name), FLAG) == path
  named = HubPlace(REPO, 'v1', 'other.th')
  for place, message in (
    (named, f'expected {named} in {constants.HF_HUB_CACHE}, as HF_HUB_OFFLINE is set, found none; unset it'),
    (HubPlace(REPO, 'v9'), f'expected hf:me/net@v9 in {constants.HF_HUB_CACHE}, as HF_HUB_OFFLINE is set, found none'),
    (HubPlace('me/other'), f'expected hf:me/other in {constants.HF_HUB_CACHE}, as HF_HUB_OFFLINE is set, found none'),
  ):
    assert refusal(place).startswith(message)
  assert not hub.requests and not logging.getLogger('huggingface_hub').propagate


def test_out_of_reach_the_cache_serves(hub, monkeypatch):
  path = download_weights(PLACE, FLAG)
  nowhere = 'http://127.0.0.1:9'  # The discard service, which nobody runs.
  hub_server.point_to(nowhere, monkeypatch)
  assert download_weights(PLACE, FLAG) == path
  assert refusal(HubPlace('me/other')).startswith(f'{nowhere} cannot be reached for hf:me/other (')


def test_some_files_of_a_repository(hub):
  hub.add(REPO, {'bundle.json': b'{}', 'stage.onnx': b'x', 'a/b/c': b'y', 'exits.json': b'[]'})
  folder = download_files(PLACE, ['bundle.json', 'exits.json', 'none.json'], prefixes=('a/',))
  assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()) == [
    *('a/b/c', 'bundle.json', 'exits.json')
  ]
  with pytest.raises(UserError, match='expected none.json in hf:me/net, found none of these; name another repository'):
    download_files(PLACE, ['none.json'])


@pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')  # Between huggingface_hub and its HTTP client.
def test_upload(hub, tmp_path, monkeypatch):
  folder = tmp_path / 'bundle'
  folder.mkdir()
  files = {'README.md': b'---\nlicense: other\n---\n', 'weights.safetensors': WEIGHTS, 'bundle.json': b'{}'}
  for name, content in files.items():
    (folder / name).write_bytes(content)
  monkeypatch.setenv('HF_TOKEN', TOKEN)
  for place in (HubPlace('me/new'), HubPlace('me/new', 'v2'), HubPlace('me/new')):
    check_upload(place, '--push-to')
    assert upload_folder(folder, place).startswith(f'{hub.endpoint}/me/new/commit/')
  assert hub.repos['me/new'] == {'main': files, 'v2': files}
  assert download_weights(HubPlace('me/new', 'v2'), FLAG).read_bytes() == WEIGHTS
  hub.broken = 418
  with pytest.raises(UserError, match='answers 418 for hf:me/new; try again later; ') as error:
    upload_folder(folder, HubPlace('me/new'))
  assert str(error.value).endswith(f'; {folder} is complete, and hf upload me/new {folder} sends it')
  folder = folder.rename(tmp_path / 'a bundle')
  with pytest.raises(UserError) as error:
    upload_folder(folder, HubPlace('me/new', 'v2'))
  assert str(error.value).endswith(f" is complete, and hf upload me/new '{folder}' --revision=v2 sends it")


def test_an_upload_that_cannot_be(hub, monkeypatch):
  def message():
    with pytest.raises(UserError) as error:
      check_upload(PLACE, '--push-to')
    return str(error.value)

  assert message() == 'hf:me/net is written with a token of the hub, found none; run hf auth login, or set HF_TOKEN'
  monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
  assert '(status 401)' in message()
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  assert message() == 'hf:me/net cannot be written while HF_HUB_OFFLINE is set; unset it, or leave out --push-to'


def test_without_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  assert refusal() == 'hf: needs huggingface_hub, found none; pip install huggingface_hub'


def test_the_environment_of_a_process(hub, tmp_path):
  """What huggingface_hub reads when it is imported, which is not before it is needed."""
  code = (
    'import sys; from paranet_jax.weights import hub; assert "huggingface_hub" not in sys.modules; '
    'print(hub.download_weights(hub.hub_place("hf:me/net", ""), ""))'
  )
  own = {'HF_ENDPOINT': hub.endpoint, 'HF_HUB_CACHE': str(tmp_path / 'own'), 'HF_HOME': str(tmp_path / 'home')}
  found = subprocess.run(
    [sys.executable, '-c', code], env=os.environ | own, capture_output=True, text=True, check=True, timeout=60
  )
  assert found.stdout.startswith(f'{tmp_path}/own/models--me--net/snapshots/') and not found.stderr
