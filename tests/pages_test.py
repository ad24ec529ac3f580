"""The pages that are not part of the site: their links work, and the drawing shows the costs that we count.

`mkdocs build --strict` checks the links of the site.
"""

import pathlib
import re
import runpy
import sys

import pytest

from paranet_jax.experiments.published import FIGURE_MACS

REPO = pathlib.Path(__file__).resolve().parents[1]
PAGES = ('README.md', 'CONTRIBUTING.md', 'results/README.md', 'pretrained/README.md')
LINK = re.compile(r'\]\(([^)#\s]+)(?:#[\w-]*)?\)|(?:src|srcset)="([^"]+)"')


@pytest.mark.parametrize('page', PAGES)
def test_links_exist(page):
  text = (REPO / page).read_text()
  links = {link or source for link, source in LINK.findall(text)}
  missing = [link for link in links if '://' not in link and not (REPO / page).parent.joinpath(link).exists()]
  assert not missing


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
