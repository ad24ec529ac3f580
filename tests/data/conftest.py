import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
  """Each test decodes into an empty cache of its own."""
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path / 'cache'))
  return tmp_path / 'cache'
