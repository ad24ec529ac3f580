"""Writes a bundle: every file of it into a folder beside the one asked for, which then takes its name."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from paranet_jax.costs import exit_costs
from paranet_jax.data.load import load_dataset
from paranet_jax.early.exit_plan import ExitPlan, read_plan
from paranet_jax.early.load import LoadedRun, load
from paranet_jax.export.card import model_card
from paranet_jax.export.compare import compare
from paranet_jax.export.contents import describe
from paranet_jax.export.facts import without_place, write_facts
from paranet_jax.export.stage_files import CALIBRATION_IMAGES, calibrating, write_onnx, write_stablehlo
from paranet_jax.export.stages import cut
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import write_json, write_text
from paranet_jax.portable import run as runtime

COMPARED_IMAGES = 1000
NOISE_IMAGES = 16
TOLERANCE = 1e-4
"""Of a float32 stage's logits, in units of the largest logit where that is above 1."""

NEEDS = {'onnx': ('jax2onnx', 'onnx', 'onnxruntime', 'safetensors'), 'stablehlo': ('flatbuffers', 'safetensors')}


class Request(NamedTuple):
  """What is exported: a run's `workdir` and the folder `out`, both absolute; `formats` of 'onnx' and 'stablehlo'."""

  workdir: Path
  out: Path
  formats: tuple[str, ...]
  dtype: str


def check_request(request: Request) -> None:
  """Looks, before anything slow, whether it can be written.

  Raises:
    UserError: something is there already, a package is missing, or the precision does not go with the format.
  """
  if os.path.lexists(request.out):
    raise UserError(f'expected no {request.out}, found something there; set --out to another folder')
  if not os.path.isdir(request.out.parent):  # Unlike Path's, false also where that cannot be looked up.
    raise UserError(f'expected a folder {request.out.parent} to write in, found none; make it, or set --out')
  if not os.access(request.out.parent, os.W_OK | os.X_OK):
    raise UserError(f'expected a folder to write in, found {request.out.parent}, which cannot be; set --out')
  if 'stablehlo' in request.formats and request.dtype != 'float32':
    raise UserError(
      f'StableHLO stages are of float32, found --dtype={request.dtype}; set --format=onnx or --dtype=float32'
    )
  for name in _packages(request):
    if importlib.util.find_spec(name) is None:
      raise UserError(f'expected {name} to export, found none; pip install -r requirements-export.txt')


def _packages(request: Request) -> list[str]:
  return sorted({name for kind in request.formats for name in NEEDS[kind]})


def export_run(request: Request) -> dict[str, Any]:
  """Writes the bundle of a calibrated run.

  Returns:
    bundle.json.

  Raises:
    UserError: the run, its exits.json or the folder does not fit; in float16 and int8 also the data set.
  """
  check_request(request)
  run = load(request.workdir)
  plan = without_place(run.exits or read_plan(request.workdir))
  return write_bundle(request, run, plan, _images(request, run))


def write_bundle(request: Request, run: LoadedRun, plan: ExitPlan, images: np.ndarray) -> dict[str, Any]:
  """Writes the bundle of a run that was read.

  Args:
    plan: of its exits.
    images: uint8 [N, H, W, C], on which the bundle is compared with JAX, and int8 is calibrated.

  Returns:
    bundle.json.

  Raises:
    UserError: the folder cannot be written, or a float32 bundle does not compute what the network does.
  """
  if hasattr(run.model, 'dtype'):
    run = dataclasses.replace(run, model=run.model.clone(dtype=jnp.float32))
  stages = cut(run.model, run.variables, run.image_shape, plan.exits, plan.visited)
  with _whole_or_not_at_all(request.out) as folder:
    packages = _packages(request)
    bundle = describe(run, plan, stages, request.formats, request.dtype, packages)
    write_facts(folder, run, plan)
    if 'onnx' in request.formats:
      write_onnx(folder, run, stages, request.dtype, images)
      bundle['checksums'] = _checksums(folder)
      write_json(folder / runtime.BUNDLE, bundle)
      bundle['agreement'] = _checked(request, compare(folder, run, plan, _compared(request, images)))
    if 'stablehlo' in request.formats:
      bundle['stablehlo'] = write_stablehlo(folder, stages)
    write_text(folder / 'README.md', model_card(run, plan, exit_costs(run.model, run.image_shape), bundle))
    bundle['checksums'] = _checksums(folder)
    write_json(folder / runtime.BUNDLE, bundle)
  return bundle


def _compared(request: Request, images: np.ndarray) -> np.ndarray:
  """The images that say how far the answers agree: of int8 those that its ranges were not taken from."""
  return images[calibrating(images) if request.dtype == 'int8' else 0 :][:COMPARED_IMAGES]


def _checked(request: Request, found: dict[str, Any]) -> dict[str, Any]:
  if request.dtype == 'float32' and not found['logits'] <= TOLERANCE:
    raise UserError(
      f'expected exported logits within {TOLERANCE:.0e} of those in JAX, found {found["logits"]:.1e}; '
      'install the versions of constraints.txt, or set --format=stablehlo'
    )
  return found | {'of': 'noise' if request.dtype == 'float32' else 'held-out'}


def _images(request: Request, run: LoadedRun) -> np.ndarray:
  if request.dtype == 'float32':
    return _noise(run)
  images = held_out_images(run)
  needed = 2 if request.dtype == 'int8' else 1  # One to take ranges from, one to compare with.
  if len(images) < needed:
    raise UserError(
      f'--dtype={request.dtype} needs {needed} held-out image{"s" * (needed > 1)} or more, found {len(images)}; '
      'set --dtype=float32, or hold out more in a new run'
    )
  return images


def _noise(run: LoadedRun) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (NOISE_IMAGES, *run.image_shape), np.uint8)


def held_out_images(run: LoadedRun) -> np.ndarray:
  """As many of the run's held-out images as are needed: uint8 [N, H, W, C].

  Raises:
    UserError: the data set cannot be read.
  """
  fields = run.config.model
  dataset = load_dataset(
    run.config.data, image_side=fields.image_side, channels=fields.channels, num_classes=fields.num_classes
  )
  if dataset.held_out is None:
    return np.zeros((0, *run.image_shape), np.uint8)
  return np.asarray(dataset.held_out.images[: CALIBRATION_IMAGES + COMPARED_IMAGES])


def _checksums(folder: Path) -> dict[str, str]:
  """SHA-256 of every file but the card, which whoever shares it may edit, and the one that holds these."""
  files = (path for path in sorted(folder.iterdir()) if path.name not in ('README.md', runtime.BUNDLE))
  return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextlib.contextmanager
def _whole_or_not_at_all(out: Path) -> Iterator[Path]:
  """A new folder beside `out` that takes its name when the context ends without an error.

  Raises:
    UserError: it cannot be written, or something of that name has come in the meantime.
  """
  folder = None
  try:
    folder = _new_folder(out)
    yield folder
    if os.path.lexists(out):
      raise UserError(f'expected no {out}, found something there; set --out to another folder')
    folder.rename(out)
  except OSError as error:
    raise UserError(f'{out} cannot be written: {error.strerror or error}; set --out to another folder') from error
  finally:
    if folder:  # What could not be made is another's.
      shutil.rmtree(folder, ignore_errors=True)


def _new_folder(out: Path) -> Path:
  folder = out.with_name(f'.{out.name}.{os.getpid()}.tmp')
  folder.mkdir()
  return folder
