"""Makes a module look like an installed package that provides a plug-in."""

import sys


def install(folder, monkeypatch, registry, name, entries, source=None):
  """Installs a package as pip does it.

  Args:
    folder: where it is installed.
    monkeypatch: undoes the installation, and what it adds to the registry.
    registry: the `Registry` that it adds to.
    name: of the package and its module.
    entries: the lines of its entry points.
    source: of the module; None: the module can already be imported.
  """
  monkeypatch.setattr(registry, 'known', dict(registry.known))
  info = folder / f'{name}-2.0.dist-info'
  info.mkdir()
  (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n')
  (info / 'entry_points.txt').write_text('\n'.join([f'[{registry.group}]', *entries, '']))
  if source:
    monkeypatch.delitem(sys.modules, name, raising=False)
    (folder / f'{name}.py').write_text(source)
  monkeypatch.syspath_prepend(folder)
