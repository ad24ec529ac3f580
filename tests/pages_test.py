"""Pages that a reader relies on: links work, drawings show what we count, and each refusal has a line that explains it.

`mkdocs build --strict` checks the links of the site.
"""

import ast
import pathlib
import re
import runpy
import sys

import pytest

from paranet_jax.base_config import RENAMED, fields_of
from paranet_jax.experiments.published import FIGURE_MACS
from paranet_jax.models.registry import family_names

REPO = pathlib.Path(__file__).resolve().parents[1]
PAGES = ('README.md', 'CONTRIBUTING.md', 'results/README.md', 'pretrained/README.md')
LINK = re.compile(r'\]\(([^)#\s]+)(?:#[\w-]*)?\)|(?:src|srcset)="([^"]+)"')


@pytest.mark.parametrize('page', PAGES)
def test_links_exist(page):
  text = (REPO / page).read_text()
  links = {link or source for link, source in LINK.findall(text)}
  missing = [link for link in links if '://' not in link and not (REPO / page).parent.joinpath(link).exists()]
  assert not missing


ANCHOR = re.compile(r'\]\(([^)#\s:]*\.md)#([\w-]+)\)')


@pytest.mark.parametrize('page', PAGES)
def test_links_to_headings_exist(page):
  """MkDocs sees the pages in docs/ alone."""
  missing = []
  for link, anchor in ANCHOR.findall((REPO / page).read_text()):
    headings = re.findall('^#+ (.+)$', (REPO / page).parent.joinpath(link).read_text(), re.MULTILINE)
    known = {re.sub(r'\s+', '-', re.sub(r'[^\w\s-]', '', heading).lower()) for heading in headings}
    if anchor not in known:
      missing.append((link, anchor))
  assert not missing


FIELD = re.compile(r'(?:`|--config\.)((?:data|loss|train|model|eval|checkpoint|log)\.\w+)(?=[=`])')
OTHERS = {'data.load', 'data.batches', 'model.safetensors'}
"""Modules and a file, with names of the same form."""


def test_fields_on_pages_exist():
  known = {field for family in family_names() for field in fields_of(family)} | RENAMED.keys() | OTHERS
  pages = [*PAGES, 'CHANGELOG.md', *(str(page.relative_to(REPO)) for page in REPO.glob('docs/*.md'))]
  named = {(page, field) for page in pages for field in FIELD.findall((REPO / page).read_text())}
  assert len(named) > 150
  assert [each for each in sorted(named) if each[1] not in known] == []


def test_the_newest_versions_are_named():
  newest = dict(re.findall(r'^(\w+)==(.+)$', (REPO / 'constraints-newest.txt').read_text(), re.MULTILINE))
  quote = f'jax {newest["jax"]}, flax {newest["flax"]}, NumPy {newest["numpy"]};'
  assert quote in (REPO / 'docs/getting_started.md').read_text()


def test_environment_variables_are_listed():
  def named(pattern, quote=''):
    files = REPO.glob(pattern)
    return {name for file in files for name in re.findall(f'{quote}(PARANET_[A-Z_]+){quote}', file.read_text())}

  macros = named('paranet_jax/**/*.cc')
  assert named('paranet_jax/**/*.py', "'") - macros == named('docs/getting_started.md')


def test_readme_fits_its_purpose():
  readme = (REPO / 'README.md').read_text().splitlines()
  assert len(readme) <= 180


@pytest.mark.parametrize('background', ['light', 'dark'])
def test_cascade_drawing_is_what_its_script_draws(background, monkeypatch):
  folder = REPO / 'docs/drawings'
  monkeypatch.syspath_prepend(folder)
  script = runpy.run_path(str(folder / 'cascade.py'))
  assert script['COSTS'] == tuple(f'{macs / 1e6:.1f} M' for macs in FIGURE_MACS)
  palette = sys.modules.pop('svg').PALETTES[background]
  assert (folder / f'cascade-{background}.svg').read_text() == script['draw'](palette)


def test_drawing_of_the_packages_is_what_its_script_draws(monkeypatch):
  folder = REPO / 'docs/drawings'
  monkeypatch.syspath_prepend(folder)
  script = runpy.run_path(str(folder / 'packages.py'))
  drawn = script['draw'](sys.modules.pop('svg').PALETTES['light'])
  assert (folder / 'packages-light.svg').read_text() == drawn, 'run python docs/drawings/packages.py'


REFUSALS = ('UserError', 'LostWorkersError', 'BundleError', 'Refused', '_Refused', 'TooManyPixels', 'TooMuchMemory')
WITHIN_ANOTHER = ('pytorch_file.py', 'tensor_pickle.py')
"""Their errors are the reason that another one gives in parentheses."""


def literal(node):
  """The fixed words of a message."""
  match node:
    case ast.Constant():
      return str(node.value)
    case ast.JoinedStr():
      return ''.join(map(literal, node.values))
    case ast.BinOp():
      return literal(node.left) + literal(node.right)
  return '\0'


def refusals():
  for file in sorted([*REPO.glob('paranet_jax/**/*.py'), *REPO.glob('examples/*.py')]):
    for node in ast.walk(ast.parse(file.read_text())) if file.name not in WITHIN_ANOTHER else ():
      if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in REFUSALS and node.args:
        message = literal(node.args[-1])
        if len(re.findall('[a-z]{2,}', message.rpartition(';')[0] or message)) > 3:  # It does not only pass another on.
          yield f'{file.name}:{node.lineno}', message


def test_every_refusal_has_a_line():
  lines = (REPO / 'docs/troubleshooting.md').read_text().splitlines()
  symptoms = re.findall(r'``.+?``|`.+?`', '\n'.join(line.split(' | ')[0] for line in lines if line.startswith('| ')))
  parts = {part.strip('` ') for symptom in symptoms for part in re.split(r'\.\.\.|\b(?:[A-Z]|NAME|FIELD)\b', symptom)}
  found = dict(refusals())
  assert len(found) > 200
  # A part that fits many messages explains none.
  told = [part for part in parts if len(part) >= 10 and ' ' in part and not part.startswith(';')]
  known = [part for part in told if sum(part in message for message in found.values()) <= 5]
  missing = {place: message for place, message in found.items() if not any(part in message for part in known)}
  assert not missing
