"""A report in a headless Chromium: nothing is loaded, nothing fails, the slider works, and it fits a phone."""

import json
import os
from pathlib import Path

import browser
import pytest

from paranet_jax.report import __main__ as report

PRETRAINED = Path(__file__).resolve().parents[2] / 'pretrained'
WITHOUT_DATA = 'PARANET_DATA_DIR, with CIFAR-100, is not set'

pytestmark = pytest.mark.skipif(not browser.CHROMIUM, reason=browser.MISSING)


@pytest.fixture(scope='module')
def page():
  with browser.opened() as page:
    yield page


def opened(page, file):
  """Opens a report on a phone and on a desk, by day and by night."""
  page.errors.clear()
  page.requests.clear()
  for width in (360, 1280):
    page.resize(width)
    page.open(f'file://{file}')
    assert page.value('document.scrollingElement.scrollWidth') <= width
  light = page.value('getComputedStyle(document.querySelector("section")).backgroundColor')
  page.resize(1280, dark=True)
  assert light != page.value('getComputedStyle(document.querySelector("section")).backgroundColor')
  assert page.errors == [] and {url for url in page.requests if not url.startswith('data:')} == {f'file://{file}'}


def assert_the_slider_works(page):
  where = '(() => { const mark = document.querySelector("#budget circle"); return [+mark.getAttribute("cx"), +mark.getAttribute("cy")]; })()'  # fmt: skip  # noqa: E501
  places = []
  for value in (0, 10, 24):
    page.value(f'document.getElementById("slider").value = {value}; document.getElementById("slider").oninput(); 0')
    places.append(page.value(where)[0])
    assert 'multiply-adds an image' in page.value('document.getElementById("point").textContent')
  assert places == sorted(places) and places[0] < places[-1]


def test_a_run_that_is_not_calibrated(page, finished_run, tmp_path):
  assert report.main([f'--workdir={finished_run}', f'--out={tmp_path}/report.html']) == 0
  assert (tmp_path / 'report.html').stat().st_size < 3_000_000
  opened(page, tmp_path / 'report.html')
  assert 'Nothing was calibrated: every image goes to exit 3' in page.text()
  assert page.value('document.querySelectorAll("svg").length') == 3
  assert_the_slider_works(page)


@pytest.mark.skipif('PARANET_DATA_DIR' not in os.environ, reason=WITHOUT_DATA)
def test_a_calibrated_run(page, tmp_path):
  assert report.main([f'--workdir={PRETRAINED}', f'--out={tmp_path}/report.html']) == 0
  assert (tmp_path / 'report.html').stat().st_size < 3_000_000
  opened(page, tmp_path / 'report.html')
  text = page.text()
  mean = json.loads((PRETRAINED / 'exits.json').read_text())['test']['cost_macs'] / 1e6
  assert 'mean of 11.00 M multiply-adds at most' in text and f'the mean was {mean:.2f} M multiply-adds' in text
  assert 'Images that leave at exit 3' in text and page.value('document.images.length') == 36
  assert_the_slider_works(page)
