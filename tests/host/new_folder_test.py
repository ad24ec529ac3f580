"""A folder that is written as a whole or not at all, and whose errors are."""

import errno
import os
import shutil

import pytest

from paranet_jax.host.errors import UserError
from paranet_jax.host.new_folder import new_folder


def test_it_appears_when_it_is_whole(tmp_path):
  with new_folder(tmp_path / 'out') as folder:
    (folder / 'file').write_text('a')
    assert not (tmp_path / 'out').exists()
  assert (tmp_path / 'out' / 'file').read_text() == 'a' and os.listdir(tmp_path) == ['out']


@pytest.mark.parametrize(
  'error',
  [BrokenPipeError(errno.EPIPE, 'Broken pipe'), FileNotFoundError(errno.ENOENT, 'No such file', 'input')],
)
def test_errors_of_other_files_stay_as_they_are(tmp_path, error):
  with pytest.raises(type(error)) as raised, new_folder(tmp_path / 'out'):
    raise error
  assert raised.value is error and not os.listdir(tmp_path)


@pytest.mark.parametrize(
  ('error', 'why'),
  [
    (OSError(errno.ENOSPC, 'No space left on device'), 'No space left on device'),
    (OSError(errno.EIO, 'Input/output error', 'HERE'), 'Input/output error'),
    (shutil.Error([('a', 'b', 'Permission denied')]), r'\[.*Permission denied.*\]'),
  ],
)
def test_errors_of_its_own_files_are_reported(tmp_path, error, why):
  expected = f'^{tmp_path}/out cannot be written: {why}; set --out to another folder$'
  with pytest.raises(UserError, match=expected), new_folder(tmp_path / 'out') as folder:
    if error.filename:
      error.filename = str(folder / 'file')
    raise error
  assert not os.listdir(tmp_path)
