"""Writes a bundle: every file of it into a folder beside the one asked for, which then takes its name."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from paranet_jax.bundle import run as runtime
from paranet_jax.bundle.agreement import agreement
from paranet_jax.bundle.card import model_card
from paranet_jax.bundle.onnx_stage import is_nchw, onnx_stage
from paranet_jax.bundle.precision import halved, quantized
from paranet_jax.bundle.stablehlo_stage import signature, stablehlo_stage
from paranet_jax.bundle.stages import Stages, StageSpec, Tensor, cut
from paranet_jax.bundle.weights import save_weights
from paranet_jax.costs import exit_costs
from paranet_jax.data.dataset import Split
from paranet_jax.data.load import load_dataset
from paranet_jax.description import environment
from paranet_jax.early.costs import mac_costs
from paranet_jax.early.exits_file import ExitPlan, read_plan, save_plan
from paranet_jax.early.load import LoadedRun, load
from paranet_jax.early.logits import split_logits
from paranet_jax.errors import UserError
from paranet_jax.steps import Preprocessing
from paranet_jax.workdir import save_config, write_json, write_text

CALIBRATION_IMAGES = 512
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
  if not request.out.parent.is_dir():
    raise UserError(f'expected a folder {request.out.parent} to write in, found none; make it, or set --out')
  if 'stablehlo' in request.formats and request.dtype != 'float32':
    raise UserError(
      f'StableHLO stages are of float32, found --dtype={request.dtype}; set --format=onnx or --dtype=float32'
    )
  for name in (name for kind in request.formats for name in NEEDS[kind]):
    if importlib.util.find_spec(name) is None:
      raise UserError(f'expected {name} to export, found none; pip install -r requirements-export.txt')


def export_run(request: Request) -> dict[str, Any]:
  """Writes the bundle of a calibrated run.

  Returns:
    bundle.json.

  Raises:
    UserError: the run, its exits.json or the folder does not fit; in float16 and int8 also the data set.
  """
  check_request(request)
  run = load(request.workdir)
  plan = run.exits or read_plan(request.workdir)
  plan = _without_place(plan, request.workdir)
  return write_bundle(request, run, plan, _noise(run) if request.dtype == 'float32' else held_out_images(run))


def write_bundle(request: Request, run: LoadedRun, plan: ExitPlan, images: np.ndarray) -> dict[str, Any]:
  """Writes the bundle of a run that was read.

  Args:
    plan: of its exits.
    images: uint8 [N, H, W, C], on which the bundle is compared with JAX, and int8 is calibrated.

  Returns:
    bundle.json.

  Raises:
    UserError: the folder cannot be written.
    RuntimeError: a float32 bundle does not compute what the network does.
  """
  if hasattr(run.model, 'dtype'):
    run = dataclasses.replace(run, model=run.model.clone(dtype=jnp.float32))
  stages = cut(run.model, run.variables, run.image_shape, plan.exits, plan.visited)
  with _whole_or_not_at_all(request.out) as folder:
    bundle = _describe(request, run, plan, stages)
    _write_facts(folder, run, plan)
    if 'onnx' in request.formats:
      _write_onnx(folder, request, run, stages, images)
      bundle['checksums'] = _checksums(folder)
      write_json(folder / runtime.BUNDLE, bundle)
      bundle['agreement'] = _compare(folder, request, run, plan, images)
    if 'stablehlo' in request.formats:
      bundle['stablehlo'] = _write_stablehlo(folder, stages)
    write_text(folder / 'README.md', model_card(run, plan, exit_costs(run.model, run.image_shape), bundle))
    bundle['checksums'] = _checksums(folder)
    write_json(folder / runtime.BUNDLE, bundle)
  return bundle


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
  return np.asarray(dataset.held_out.images[: CALIBRATION_IMAGES + COMPARED_IMAGES])


def _describe(request: Request, run: LoadedRun, plan: ExitPlan, stages: Stages) -> dict[str, Any]:
  versions = dict(environment([_NoDevice])['versions'])
  versions |= {name: importlib.metadata.version(name) for kind in request.formats for name in NEEDS[kind]}
  every = tuple(range(len(plan.exits)))
  return {
    'schema_version': runtime.SCHEMA_VERSION,
    'name': run.config.name,
    'step': run.step,
    'formats': list(request.formats),
    'dtype': request.dtype,
    'num_classes': len(run.dataset.class_names),
    'stages': {name: _stage_entry(spec) for name, spec in stages.specs.items()},
    'visited_stages': list(stages.visited),
    'all_stages': list(stages.all),
    'all_macs': [int(macs) for macs in mac_costs(run.model, run.image_shape, plan.exits).cumulative(every)],
    'versions': versions,
  }


class _NoDevice:
  platform, device_kind = '', ''


def _stage_entry(spec: StageSpec) -> dict[str, Any]:
  return {
    'exit': spec.number,
    'file': f'{spec.name}.onnx',
    'takes': [_tensor_entry(tensor) for tensor in spec.takes],
    'gives': [_tensor_entry(tensor) for tensor in spec.gives],
    'keeps': list(spec.keeps),
  }


def _tensor_entry(tensor: Tensor) -> dict[str, Any]:
  *sides, channels = tensor.shape
  shape = [channels, *sides] if is_nchw(tensor) else list(tensor.shape)
  return {'name': tensor.name, 'shape': ['batch', *shape], 'dtype': 'float32'}


def _write_facts(folder: Path, run: LoadedRun, plan: ExitPlan) -> None:
  """All that is not a stage."""
  save_plan(folder, plan)
  write_text(folder / runtime.CLASSES, json.dumps(run.dataset.class_names, indent=2) + '\n')
  side, _, channels = run.image_shape
  preprocessing = {
    'side': side,
    'channels': channels,
    'mean': list(run.dataset.mean),
    'std': list(run.dataset.std),
    'resize': runtime.RESIZE,
    'normalize': '(pixel / 255 - mean) / std, a channel',
  }
  write_json(folder / runtime.PREPROCESSING, preprocessing)
  config = run.config.copy_and_resolve_references()
  with config.unlocked():
    del config.data.data_dir  # Where things lie on this machine is nobody else's.
    config.init_from = Path(config.init_from).name
  save_config(folder, config)
  save_weights(folder / 'weights.safetensors', run.variables)
  shutil.copyfile(runtime.__file__, folder / 'run.py')


def _without_place(plan: ExitPlan, workdir: Path) -> ExitPlan:
  """The plan without where the run lies on this machine."""
  if not plan.provenance or 'command' not in plan.provenance:
    return plan
  command = str(plan.provenance['command']).replace(f'{workdir.parent}/', '')
  return dataclasses.replace(plan, provenance=plan.provenance | {'command': command})


def _write_onnx(folder: Path, request: Request, run: LoadedRun, stages: Stages, images: np.ndarray) -> None:
  import onnx

  models = {name: onnx_stage(spec) for name, spec in stages.specs.items()}
  if request.dtype == 'float16':
    models = {name: halved(model) for name, model in models.items()}
  elif request.dtype == 'int8':
    models = _quantized(models, run, stages, images[: _calibrating(images)])
  for name, model in models.items():
    onnx.checker.check_model(model)
    onnx.save(model, folder / f'{name}.onnx')


def _calibrating(images: np.ndarray) -> int:
  """How many of the images ranges are taken from; those after them say how far the answers agree."""
  return min(CALIBRATION_IMAGES, len(images) // 2)


def _quantized(models: dict[str, Any], run: LoadedRun, stages: Stages, images: np.ndarray) -> dict[str, Any]:
  """Each stage quantized on what the float32 stages before it leave of these images."""
  import onnxruntime

  found = {}
  mean, std = np.float32(run.dataset.mean), np.float32(run.dataset.std)
  for path in (stages.all, stages.visited):
    carried = {'images': (images.astype(np.float32) / 255 - mean) / std}
    for name in path:
      takes = {tensor.name: carried[tensor.name] for tensor in stages.specs[name].takes}
      session = onnxruntime.InferenceSession(models[name].SerializeToString(), providers=['CPUExecutionProvider'])
      gives = [tensor.name for tensor in stages.specs[name].gives]
      if name not in found:
        found[name] = quantized(models[name], takes)
      if gives:
        carried |= dict(zip(gives, session.run(gives, takes), strict=True))
  return found


def _compare(folder: Path, request: Request, run: LoadedRun, plan: ExitPlan, images: np.ndarray) -> dict[str, Any]:
  images = images[_calibrating(images) if request.dtype == 'int8' else 0 :][:COMPARED_IMAGES]
  preprocessing = Preprocessing(run.dataset.mean, run.dataset.std, crop_padding=0, flip=False)
  split = Split(images, np.zeros(len(images), np.int32))
  logits = split_logits(run.model, run.variables, plan.exits, preprocessing, split, 64)
  found = agreement(logits, plan, runtime.load(folder), images)
  if request.dtype == 'float32' and not found['logits'] <= TOLERANCE:
    raise RuntimeError(f'the exported logits differ by {found["logits"]:.1e}, expected {TOLERANCE:.0e} at most')
  return found | {'of': 'noise' if request.dtype == 'float32' else 'held-out'}


def _write_stablehlo(folder: Path, stages: Stages) -> dict[str, Any]:
  entries = {}
  for name, spec in stages.specs.items():
    exported = stablehlo_stage(spec)
    (folder / f'{name}.stablehlo').write_bytes(exported.serialize())
    entries[name] = {'file': f'{name}.stablehlo'} | signature(exported, spec.takes, spec.gives)
  return entries


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
  folder = out.with_name(f'.{out.name}.{os.getpid()}.tmp')
  try:
    folder.mkdir()
    yield folder
    if os.path.lexists(out):
      raise UserError(f'expected no {out}, found something there; set --out to another folder')
    folder.rename(out)
  except OSError as error:
    raise UserError(f'{out} cannot be written: {error.strerror or error}; set --out to another folder') from error
  finally:
    shutil.rmtree(folder, ignore_errors=True)
