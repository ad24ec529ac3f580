"""The wheel trains outside the repository: it holds the configurations. Run by hand: it builds and installs.

python -m pytest tests/slow/wheel_test.py
"""

import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ('model.layers_per_block=1', 'model.growth_rate=2', 'model.image_side=8', 'train.batch_size=220')


def run(*command, cwd):
  done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_an_installed_wheel_trains(tmp_path):
  run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--wheel-dir', tmp_path, REPOSITORY, cwd=tmp_path)
  (wheel,) = tmp_path.glob('*.whl')
  shipped = {f'paranet_jax/configs/{path.name}' for path in (REPOSITORY / 'configs').glob('*.py')}
  shipped |= {f'paranet_jax/{name}' for name in ('export/page/index.html', 'report/page.html')}
  assert shipped <= set(zipfile.ZipFile(wheel).namelist())
  run(sys.executable, '-m', 'venv', '--system-site-packages', tmp_path / 'venv', cwd=tmp_path)
  python = tmp_path / 'venv/bin/python'
  # A virtual environment does not see the packages of the one that it was made in.
  path = next(Path(entry) for entry in sys.path if entry.endswith('site-packages'))
  (site,) = (tmp_path / 'venv').glob('lib/python*/site-packages')
  (site / 'parent.pth').write_text(f'{path}\n')
  run(python, '-m', 'pip', 'install', '--no-deps', '--no-index', '--force-reinstall', wheel, cwd=tmp_path)
  command = (python, '-m', 'paranet_jax.main', '--workdir=run', '--config.train.max_steps=2')
  run(*command, '--config=paranet_jax:quickstart', *(f'--config.{field}' for field in TINY), cwd=tmp_path)
  assert (tmp_path / 'run/summary.json').exists()
  described = run(
    python, '-m', 'paranet_jax.main', '--config=paranet_jax:paranet:PN3-x3d', '--mode=describe', cwd=tmp_path
  )
  assert described.startswith('PN3-x3d on cifar100')
