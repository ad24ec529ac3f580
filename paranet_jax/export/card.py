"""The README.md of a bundle: a model card with the metadata that model hubs read."""

import json
from collections.abc import Sequence
from typing import Any

from paranet_jax.data.known import known_dataset
from paranet_jax.display.tables import human_count
from paranet_jax.early.exit_plan import FULL, ExitPlan
from paranet_jax.early.loaded_run import LoadedRun
from paranet_jax.early.sentences import is_another_network, not_promised, promises, watch_sentence
from paranet_jax.export.state_dict import STATE_DICT, pytorch_tensors

_RUN_ONNX = """With Python 3.10 or newer:

```bash
pip install numpy onnxruntime pillow
python run.py photo.png photos/
```

The docstring of `run.py` shows its use from Python, including one stage at a time."""
_RUN_STABLEHLO = """```python
from pathlib import Path

from jax import export

stage = export.deserialize(Path('{stage}.stablehlo').read_bytes())
logits, *features = stage.call(images)  # Normalized as in preprocessing.json.
```

`exits.json` says when an image exits. `run.py` needs ONNX stages."""


def model_card(run: LoadedRun, plan: ExitPlan, costs: Sequence[dict[str, int]], bundle: dict[str, Any]) -> str:
  """The text of the model card.

  Args:
    costs: as `costs.exit_costs` returns them.
    bundle: bundle.json, except for the checksums.
  """
  parts = [
    _metadata(run, plan, bundle),
    _what(run, bundle),
    _exits(plan, costs),
    *_promised(plan, bundle),
    _files(run, bundle),
    _made(run, plan, bundle),
  ]
  return '\n\n'.join(parts) + '\n'


def _metadata(run: LoadedRun, plan: ExitPlan, bundle: dict[str, Any]) -> str:
  name = json.dumps(run.dataset.name)
  lines = [
    f'library_name: {"onnxruntime" if "onnx" in bundle["formats"] else "jax"}',
    'pipeline_tag: image-classification',
    'license: other',
    'license_name: that-of-the-data',
    f'datasets:\n- {name}',
    '\n- '.join(['tags:', *bundle['formats'], 'early-exit', 'image-classification']),
  ]
  if plan.test and plan.test.get('accuracy') is not None and not is_another_network(bundle):
    lines += [
      'metrics:\n- accuracy',
      f'model-index:\n- name: {json.dumps(run.config.name)}',
      '  results:\n  - task:\n      type: image-classification',
      f'    dataset:\n      type: {name}\n      name: {name}\n      split: test',
      f'    metrics:\n    - type: accuracy\n      value: {plan.test["accuracy"]:.4f}',
    ]
  return '\n'.join(['---', *lines, '---'])


def _what(run: LoadedRun, bundle: dict[str, Any]) -> str:
  height, width, channels = run.image_shape
  return f"""# {run.config.name} on {run.dataset.name}, with early exits

An image classifier that stops as soon as it is confident: {len(run.dataset.class_names)} classes, images of
{height} x {width} pixels and {channels} channel{'s' * (channels > 1)}, {bundle['dtype']}.

{_RUN_ONNX if 'onnx' in bundle['formats'] else _RUN_STABLEHLO.format(stage=bundle['all_stages'][0])}"""


def _exits(plan: ExitPlan, costs: Sequence[dict[str, int]]) -> str:
  test = plan.test or {}
  kind = 'agreement' if 'agreement' in test else 'accuracy'
  accuracy = test.get(f'exit_{kind}') or [None] * len(plan.exits)
  shares = test.get('shares') or [None] * len(plan.exits)
  params = {cost['exit']: cost['params'] for cost in costs}
  rows = [
    f'| {number} | {_percent(right)} | {_percent(share)} | {human_count(alone)} | {human_count(params[number])} |'
    for number, right, share, alone in zip(plan.exits, accuracy, shares, plan.macs_alone, strict=True)
  ]
  if test:
    rows.append(f'| as calibrated | {_percent(test[kind])} | | {human_count(round(test["cost_macs"]))} | |')
  words = 'test accuracy (%)' if kind == 'accuracy' else f'same answer as exit {plan.exits[-1]} on test images (%)'
  header = f'| exit | {words} | share of images (%) | multiply-adds per image | parameters up to it |'
  dtype = f'in {plan.dtype}' if plan.dtype else 'at its training precision'
  how = [
    f'Calibrated for {json.dumps(plan.target)}, with policy `{plan.policy}` and score `{plan.score}`. Accuracies were',
    f'measured during calibration, with the network in JAX {dtype}.',
  ]
  if kind == 'agreement':
    how[0] = how[0].replace('Accuracies were', 'The images have no labels; agreements were')
  if plan.policy == FULL:
    how = [f'Not calibrated: every image goes to exit {plan.exits[-1]}, and nothing was measured.']
  return '\n'.join(
    [
      '## Exits',
      '',
      header,
      '|---|---|---|---|---|',
      *rows,
      '',
      *how,
    ]
  )


def _promised(plan: ExitPlan, bundle: dict[str, Any]) -> list[str]:
  if plan.policy == FULL:
    return []
  lines = [f'- {line}' for line in (*promises(plan), *filter(None, [watch_sentence(plan)]))]
  if not is_another_network(bundle):
    return ['\n'.join(['## What is promised', '', *lines])]
  why = [not_promised(bundle)]
  if 'onnx' in bundle['formats']:
    why.append('`python -m paranet_jax.calibrate --bundle=DIR --images=FOLDER` calibrates it on images of yours.')
  return ['\n'.join(['## What was promised', '', *why, '', *lines])]


def _files(run: LoadedRun, bundle: dict[str, Any]) -> str:
  lines = [
    '## Files',
    '',
    '`exits.json`: temperatures, thresholds, costs and test results. `classes.json`: the class names, in the order of',
    'the logits. `preprocessing.json`: how an image becomes the input. `weights.safetensors`: the weights by path.',
    '`config.json`: the training configuration. `bundle.json`: every stage with its inputs and outputs, and the',
    'checksums of all files except this one.',
  ]
  if pytorch_tensors(run):
    lines.append(f'`{STATE_DICT}`: the network without its added exits, as a state dict in the names of PyTorch.')
  if 'onnx' in bundle['formats']:
    lines += [
      '',
      'ONNX, any batch size; images [batch, height, width, channel], features [batch, channel, height, width]:',
      '',
      '| file | takes | gives |',
      '|---|---|---|',
      *(_stage_row(spec) for spec in bundle['stages'].values()),
    ]
  if 'web' in bundle:
    lines += [
      '',
      '`index.html` shows it in a browser: `python -m http.server` in this folder, then open http://localhost:8000.',
    ]
  if 'stablehlo' in bundle['formats']:
    lines += ['', 'Load `*.stablehlo` with `jax.export.deserialize(bytes).call`; `bundle.json` lists their signatures.']
  return '\n'.join(lines)


def _stage_row(spec: dict[str, Any]) -> str:
  gives = ', '.join(['logits', *filter(None, [_names(spec['gives'])])])
  return f'| {spec["file"]} | {_names(spec["takes"])} | {gives} |'


def _names(tensors: Sequence[dict[str, Any]]) -> str:
  return ', '.join(f'{tensor["name"]} {tensor["shape"]}'.replace("'", '') for tensor in tensors)


def _made(run: LoadedRun, plan: ExitPlan, bundle: dict[str, Any]) -> str:
  found, calibrated = bundle.get('agreement'), plan.policy != FULL
  made = [
    f'Data: {f"{run.dataset.name} {run.dataset.version}".strip()}, {run.dataset.counts["train"]:,} training, '
    f'{run.dataset.counts["held_out"]:,} held-out and {run.dataset.counts["test"]:,} test images. '
    f'License of the data: {known_dataset(run.config.data.name).license}.',
    '',
    f'Trained to step {run.step} with `config.json`. To train it again, copy that file into an empty folder:',
    '',
    '```bash',
    'python -m paranet_jax.main --workdir=FOLDER',
    *([(plan.provenance or {}).get('command', 'python -m paranet_jax.calibrate --workdir=FOLDER')] * calibrated),
    '```',
  ]
  if not any(run.dataset.counts.values()):
    made = [f'The weights were trained elsewhere, on {run.dataset.name}; ask their provider for the terms.']
  lines = [
    '## How it was made',
    '',
    *made,
    '',
    f'Versions: {", ".join(f"{name} {version}" for name, version in bundle["versions"].items())}.',
  ]
  if bundle['dtype'] == 'float16':
    lines.append('Weights are stored in float16; ONNX Runtime casts them to float32 and computes in float32.')
  if found:
    lines.append(f'Compared with the network in JAX on {found["images"]:,} {found["of"]} images: {_agreement(found)}.')
  return '\n'.join(lines)


def _agreement(found: dict[str, Any]) -> str:
  if found['of'] == 'noise':  # Equal labels on noise would say little about photographs.
    return f'logits differ by at most {found["logits"]:.1e}, relative to the largest'
  return f'{_percent(found["labels"])} % the same labels, {_percent(found["exits"])} % the same exits'


def _percent(share: float | None) -> str:
  return '' if share is None else f'{100 * share:.2f}'
