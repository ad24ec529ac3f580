"""The requirement files and the tested versions agree with each other and with the imports of the code."""

import ast
import importlib.metadata
import pathlib
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = pathlib.Path(__file__).resolve().parents[2]
OURS_OR_ASKED_FOR = {'paranet_jax', 'configs', 'openvino'}
"""OpenVINO is imported where a user asks for it by name."""
FILES = sorted(path.name for path in REPO.glob('requirements*.txt'))
SERVICE = 'examples/requirements.txt'
NOTEBOOKS = ('own_backbone', 'train_calibrate_plot')
SERVICE_MODULES = {path.stem for path in (REPO / 'examples').glob('*.py')} - set(NOTEBOOKS)


def read(name: str) -> dict[str, Requirement]:
  lines = (line.partition('#')[0].strip() for line in (REPO / name).read_text().splitlines())
  requirements = [Requirement(line) for line in lines if line]
  return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_files_are_those_expected():
  assert FILES == [
    f'requirements{extra}.txt' for extra in ('-cuda', '-docs', '-export', '-hub', '-report', '-test', '-tpu', '')
  ]


def test_tests_need_what_the_service_needs():
  assert read(SERVICE).items() <= (read('requirements.txt') | read('requirements-test.txt')).items()


@pytest.mark.parametrize('extra', ['export', 'hub', 'report'])
def test_tests_need_what_an_extra_needs(extra):
  assert read(f'requirements-{extra}.txt').items() <= read('requirements-test.txt').items()


@pytest.mark.parametrize('file', [*FILES, SERVICE])
def test_tested_set_is_within_the_ranges(file):
  pins = read('constraints.txt')
  for name, requirement in read(file).items():
    (pin,) = pins[name].specifier
    assert pin.operator == '=='
    assert requirement.specifier and requirement.specifier.contains(pin.version), f'{requirement} against {pin}'


@pytest.mark.parametrize('file', [*FILES, SERVICE, 'constraints.txt'])
def test_no_other_framework(file):
  assert not {'tensorflow', 'tensorflow-cpu', 'tf-nightly', 'torch', 'torchvision', 'clu'} & set(read(file))


@pytest.mark.parametrize(
  ('patterns', 'files', 'ours'),
  [
    (
      ('paranet_jax/**/*.py', 'configs/*.py', *(f'examples/{name}.py' for name in NOTEBOOKS)),
      ('requirements.txt', 'requirements-export.txt', 'requirements-hub.txt', 'requirements-report.txt'),
      OURS_OR_ASKED_FOR,
    ),
    ([f'examples/{name}.py' for name in SERVICE_MODULES], (SERVICE,), SERVICE_MODULES),
  ],
)
def test_all_that_the_code_imports_is_required(patterns, files, ours):
  distributions = importlib.metadata.packages_distributions()
  required = {name for file in files for name in read(file)}
  for path in [path for pattern in patterns for path in REPO.glob(pattern)]:
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
      for name in {name.partition('.')[0] for name in names} - ours - sys.stdlib_module_names:
        assert {canonicalize_name(d) for d in distributions.get(name, [])} & required, f'{path} imports {name}'
