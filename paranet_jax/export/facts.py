"""What lies in a bundle beside its stages, without where the run lies on this machine."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

from paranet_jax.early.exit_plan import ExitPlan, save_plan
from paranet_jax.early.load import LoadedRun
from paranet_jax.export.weights import save_weights
from paranet_jax.host.files import write_json, write_text
from paranet_jax.portable import run as runtime
from paranet_jax.runs.workdir import save_config

_FOLDERS = ('--workdir', '--compilation_cache')


def write_facts(folder: Path, run: LoadedRun, plan: ExitPlan) -> None:
  """Writes exits.json, the class names, how images are prepared, the configuration, the weights and run.py."""
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


def without_place(plan: ExitPlan) -> ExitPlan:
  """The plan without folders of the machine that calibrated it, which may be another than this one."""
  if not plan.provenance or 'command' not in plan.provenance:
    return plan
  command = _without_folders(str(plan.provenance['command']))
  return dataclasses.replace(plan, provenance=plan.provenance | {'command': command})


def _without_folders(command: str) -> str:
  try:
    words = shlex.split(command)
  except ValueError:  # It was edited, and nobody knows where its folders begin and end.
    return 'python -m paranet_jax.calibrate --workdir=FOLDER'
  for place, (before, word) in enumerate(zip(['', *words], words, strict=False)):
    flag, given, _ = word.partition('=')
    if before in _FOLDERS:
      words[place] = 'FOLDER'
    elif flag in _FOLDERS and given:
      words[place] = f'{flag}=FOLDER'
  return shlex.join(words)
