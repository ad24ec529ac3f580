"""Writes a bundle, file by file, into a temporary folder that takes the requested name once it is complete."""

import dataclasses
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from paranet_jax.costs import exit_costs
from paranet_jax.early.exit_plan import FULL, ExitPlan, uncalibrated_line, without_local_paths
from paranet_jax.early.loaded_run import LoadedRun, load
from paranet_jax.export.card import model_card
from paranet_jax.export.compare import compare
from paranet_jax.export.contents import describe_bundle, write_contents
from paranet_jax.export.onnx import onnx_stage
from paranet_jax.export.precision import CALIBRATION_IMAGES, calibration_count, halved, quantized_stages
from paranet_jax.export.stablehlo import write_stablehlo
from paranet_jax.export.stages import Stages, cut
from paranet_jax.export.web import page_library, write_page
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.files import write_json, write_text
from paranet_jax.host.new_folder import check_absent, new_folder
from paranet_jax.portable import run as runtime
from paranet_jax.runs.dtype import has_dtype

COMPARED_IMAGES = 1000
NOISE_IMAGES = 16
TOLERANCE = 1e-4
"""On float32 logits, relative to the largest logit where that is above 1."""
_DRAWN_SEED = 400

NEEDS = {'onnx': ('jax2onnx', 'onnx', 'onnxruntime', 'safetensors'), 'stablehlo': ('flatbuffers', 'safetensors')}


class Request(NamedTuple):
  """What to export: paths are absolute, `formats` holds 'onnx' and 'stablehlo'."""

  workdir: Path
  out: Path
  formats: tuple[str, ...]
  dtype: str
  data_dir: Path | None = None
  accept_data_changes: bool = False
  web: bool = False
  web_runtime: Path | None = None


def check_request(request: Request) -> None:
  """Checks, before anything slow, that the bundle can be written.

  Raises:
    UserError: `out` exists, a package is missing, or the format does not support the precision or the page.
  """
  check_absent(request.out)
  if not os.path.isdir(request.out.parent):  # Unlike Path.is_dir, also False where the name is too long.
    raise UserError(f'expected a folder {request.out.parent} to write in, found none; create it, or set --out')
  if not os.access(request.out.parent, os.W_OK | os.X_OK):
    raise UserError(f'expected a writable folder, found {request.out.parent}, which is not; set --out')
  if 'stablehlo' in request.formats and request.dtype != 'float32':
    raise UserError(
      f'StableHLO stages are float32 only, found --dtype={request.dtype}; set --format=onnx or --dtype=float32'
    )
  if request.web_runtime and not request.web:
    raise UserError('--web-runtime is what the page of --web runs on; set --web, or leave it out')
  if request.web and 'onnx' not in request.formats:
    raise UserError('--web runs ONNX stages, found --format=stablehlo; set --format=onnx or --format=both')
  for name in _packages(request):
    if importlib.util.find_spec(name) is None:
      raise UserError(f'exporting needs {name}, found none; pip install -r requirements-export.txt')


def _packages(request: Request) -> list[str]:
  return sorted({name for kind in request.formats for name in NEEDS[kind]})


def export_run(request: Request) -> dict[str, Any]:
  """Writes the bundle of a run; returns bundle.json. That of one that is not calibrated answers at its last exit.

  Raises:
    UserError: the run, its exits.json, the folder or (for float16 and int8) the data set does not fit.
  """
  check_request(request)
  run = load(request.workdir)
  if run.plan.policy == FULL:
    say(uncalibrated_line(run.plan, request.workdir))
  return write_bundle(request, run, without_local_paths(run.plan), _images(request, run))


def write_bundle(
  request: Request, run: LoadedRun, plan: ExitPlan, images: UInt8[np.ndarray, 'N H W C']
) -> dict[str, Any]:
  """Writes the bundle of a loaded run; returns bundle.json.

  Args:
    images: on which the bundle is compared with JAX, and int8 is calibrated.

  Raises:
    UserError: the folder cannot be written, the files of the page cannot be read or downloaded, or a float32 bundle
      does not reproduce the network's logits.
  """
  library = page_library(request.web_runtime) if request.web else None
  computed_in = 'float32'
  if has_dtype(run.model):
    computed_in = np.dtype(run.model.dtype).name
    run = dataclasses.replace(run, model=run.model.clone(dtype=np.float32))
  if computed_in != request.dtype:  # A watch would find that another network answers.
    plan = dataclasses.replace(plan, seen=None)
  calibrated, plan = plan, dataclasses.replace(plan, dtype=None)
  stages = cut(run.model, run.variables, run.image_shape, plan.exits, plan.visited)
  with new_folder(request.out) as folder:
    bundle = describe_bundle(run, plan, stages, request.formats, request.dtype, _packages(request))
    bundle['calibrated_dtype'] = None if plan.policy == FULL else computed_in
    write_contents(folder, run, plan)
    if 'onnx' in request.formats:
      _write_onnx(folder, run, stages, request.dtype, images)
      bundle['checksums'] = _checksums(folder)
      write_json(folder / runtime.BUNDLE, bundle)
      bundle['agreement'] = _checked(request, compare(folder, run, plan, _compared(request, images)))
    if 'stablehlo' in request.formats:
      bundle['stablehlo'] = write_stablehlo(folder, stages)
    if library:
      bundle['web'] = write_page(folder, library)
    write_text(folder / 'README.md', model_card(run, calibrated, exit_costs(run.model, run.image_shape), bundle))
    bundle['checksums'] = _checksums(folder)
    write_json(folder / runtime.BUNDLE, bundle)
  return bundle


def _write_onnx(folder: Path, run: LoadedRun, stages: Stages, dtype: str, images: UInt8[np.ndarray, 'N H W C']) -> None:
  import onnx

  models = {name: onnx_stage(spec) for name, spec in stages.specs.items()}
  if dtype == 'float16':
    models = {name: halved(model) for name, model in models.items()}
  elif dtype == 'int8':
    mean, std = (np.asarray(values, np.float32) for values in (run.dataset.mean, run.dataset.std))
    calibrating = images[: calibration_count(images)].astype(np.float32)
    models = quantized_stages(models, stages, (calibrating / 255 - mean) / std)
  for name, model in models.items():
    onnx.checker.check_model(model)
    onnx.save(model, folder / f'{name}.onnx')


def _compared(request: Request, images: UInt8[np.ndarray, 'N H W C']) -> UInt8[np.ndarray, 'n H W C']:
  """The images on which the agreement is measured: for int8, those that did not calibrate it."""
  return images[calibration_count(images) if request.dtype == 'int8' else 0 :][:COMPARED_IMAGES]


def _checked(request: Request, found: dict[str, Any]) -> dict[str, Any]:
  if request.dtype == 'float32' and not found['logits'] <= TOLERANCE:
    raise UserError(
      f'expected exported logits within {TOLERANCE:.0e} of those in JAX, found {found["logits"]:.1e}; '
      'install the versions in constraints.txt, or set --format=stablehlo'
    )
  return found | {'of': 'noise' if request.dtype == 'float32' else 'held-out'}


def _images(request: Request, run: LoadedRun) -> UInt8[np.ndarray, 'N H W C']:
  if request.dtype == 'float32':
    return np.random.default_rng(0).integers(0, 256, (NOISE_IMAGES, *run.image_shape), np.uint8)
  images = held_out_images(run, request.data_dir, request.accept_data_changes)
  needed = 2 if request.dtype == 'int8' else 1  # int8: one to calibrate on, one to compare.
  if len(images) < needed:
    raise UserError(
      f'--dtype={request.dtype} needs at least {needed} held-out image{"s" * (needed > 1)}, found {len(images)}; '
      'set --dtype=float32, or train with a larger --config.data.held_out'
    )
  return images


def held_out_images(
  run: LoadedRun, data_dir: Path | None = None, accept_data_changes: bool = False
) -> UInt8[np.ndarray, 'N H W C']:
  """As many of the run's held-out images as an export uses, drawn at random: a folder lists its files by class.

  Args:
    data_dir: folder of the data set; None: as the run says.
    accept_data_changes: the data may have other classes or labels than the run learned.

  Raises:
    UserError: the data set cannot be read.
  """
  held_out = run.load_dataset(data_dir, accept_data_changes).held_out
  if held_out is None:
    return np.zeros((0, *run.image_shape), np.uint8)
  # RandomState: only its stream is the same in every NumPy version.
  order = np.random.RandomState(_DRAWN_SEED).permutation(len(held_out))
  return np.asarray(held_out.images[order[: CALIBRATION_IMAGES + COMPARED_IMAGES]])


def _checksums(folder: Path) -> dict[str, str]:
  """SHA-256 of every file except bundle.json, which holds the checksums, and the model card, which may be edited."""
  files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob('*')) if path.is_file()}
  digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
  return {name: digest for name, digest in digests.items() if name not in ('README.md', runtime.BUNDLE)}
