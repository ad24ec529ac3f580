"""Pictures never stop a command, whatever is set for matplotlib."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from paranet_jax import train
from paranet_jax.calibrate import __main__ as calibrate_command
from paranet_jax.calibrate import calibration, summary_text
from paranet_jax.display import curves as curves_lib
from paranet_jax.display.pictures import drawn
from paranet_jax.host.errors import UserError

CODE = """
from pathlib import Path
from paranet_jax.display.pictures import drawn

def draw():
  from matplotlib.figure import Figure
  from paranet_jax.display.plots import own_style, save_figure
  with own_style():
    figure = Figure()
    figure.suptitle('text')
    save_figure(figure, Path('a.png'))

print(drawn(draw))
"""


@pytest.mark.parametrize(
  ('backend', 'settings', 'expected'),
  [
    ('qt9', b'text.usetex: True\nbackend: nothing\n', 'None'),
    ('', b'\xff', "not drawn: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
  ],
)
def test_settings_of_matplotlib(tmp_path, backend, settings, expected):
  (tmp_path / 'matplotlibrc').write_bytes(settings)
  environment = os.environ | {'MPLBACKEND': backend, 'PYTHONPATH': os.getcwd()}
  done = subprocess.run([sys.executable, '-c', CODE], cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.stdout.strip() == expected and (tmp_path / 'a.png').exists() == (expected == 'None'), done.stderr


def fails(*_):
  raise ValueError("'qt9' is not\na backend")


def test_what_the_picture_shows_cannot_be_read():
  def damaged():
    raise UserError('metrics.jsonl is damaged')

  with pytest.raises(UserError, match='is damaged'):
    drawn(damaged)


def test_learning_curves(tmp_path, monkeypatch):
  monkeypatch.setattr(curves_lib, 'draw_curves', fails)
  assert train.draw_curves(tmp_path) == "not drawn: 'qt9' is not a backend"


def test_figures_of_calibrate(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(calibration, 'calibrate', lambda *_: SimpleNamespace(problem=None, plan=None))
  monkeypatch.setattr(summary_text, 'summary_text', lambda _: 'summary')
  monkeypatch.setattr(calibrate_command, '_draw', fails)
  flags = SimpleNamespace(workdir=tmp_path, curves=True, compilation_cache=None, accept_wrong_numbers=False)
  calibrate_command._run(flags, '')
  assert capsys.readouterr().out.endswith("figure: not drawn: 'qt9' is not a backend\n")
