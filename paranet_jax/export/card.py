"""README.md of a bundle: a model card, with the metadata that model hubs read."""

import json
from collections.abc import Sequence
from typing import Any

from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.load import LoadedRun
from paranet_jax.report.tables import human_count

LICENCES = {
  'cifar100': 'Krizhevsky 2009; distributed for research without a stated licence',
  'cifar10': 'Krizhevsky 2009; distributed for research without a stated licence',
  'digits': 'Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998, CC BY 4.0',
  'folder': "the exporter's own images; whoever shares this says what may be done with it",
}
_RUN_ONNX = """With Python 3.10 or newer:

```bash
pip install numpy onnxruntime pillow
python run.py photo.png photos/
```

`run.py` documents its use from Python, stage by stage too."""
_RUN_STABLEHLO = """```python
from pathlib import Path

from jax import export

stage = export.deserialize(Path('{stage}.stablehlo').read_bytes())
logits, *features = stage.call(images)  # As preprocessing.json says.
```

When an image leaves, `exits.json` says. `run.py` is for ONNX stages alone."""
_UNKNOWN_LICENCE = 'see the data set; not known to the exporter'


def model_card(run: LoadedRun, plan: ExitPlan, costs: Sequence[dict[str, int]], bundle: dict[str, Any]) -> str:
  """The text.

  Args:
    costs: of `costs.exit_costs`.
    bundle: bundle.json, but for the checksums.
  """
  parts = [
    _metadata(run, plan, bundle),
    _what(run, bundle),
    _exits(plan, costs),
    _files(bundle),
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
    'metrics:\n- accuracy',
    f'model-index:\n- name: {json.dumps(run.config.name)}',
  ]
  if plan.test:
    lines += [
      '  results:\n  - task:\n      type: image-classification',
      f'    dataset:\n      type: {name}\n      name: {name}\n      split: test',
      f'    metrics:\n    - type: accuracy\n      value: {plan.test["accuracy"]:.4f}',
    ]
  return '\n'.join(['---', *lines, '---'])


def _what(run: LoadedRun, bundle: dict[str, Any]) -> str:
  height, width, channels = run.image_shape
  return f"""# {run.config.name} on {run.dataset.name}, with early exits

An image classifier that stops as soon as it is sure: {len(run.dataset.class_names)} classes, images of
{height} x {width} pixels and {channels} channel{'s' * (channels > 1)}, {bundle['dtype']}.

{_RUN_ONNX if 'onnx' in bundle['formats'] else _RUN_STABLEHLO.format(stage=bundle['all_stages'][0])}"""


def _exits(plan: ExitPlan, costs: Sequence[dict[str, int]]) -> str:
  test = plan.test or {}
  accuracy = test.get('exit_accuracy') or [None] * len(plan.exits)
  shares = test.get('shares') or [None] * len(plan.exits)
  params = {cost['exit']: cost['params'] for cost in costs}
  rows = [
    f'| {number} | {_percent(right)} | {_percent(share)} | {human_count(alone)} | {human_count(params[number])} |'
    for number, right, share, alone in zip(plan.exits, accuracy, shares, plan.macs_alone, strict=True)
  ]
  if test:
    rows.append(f'| as calibrated | {_percent(test["accuracy"])} | | {human_count(round(test["cost_macs"]))} | |')
  header = '| exit | test accuracy (%) | leave there (%) | multiply-adds an image | parameters, with the exits before |'
  asked = json.dumps(plan.target) if plan.target else 'the last exit'
  return '\n'.join(
    [
      '## Exits',
      '',
      header,
      '|---|---|---|---|---|',
      *rows,
      '',
      f'Calibrated for {asked}, by policy `{plan.policy}` and score `{plan.score}`. Accuracies are of the network in',
      'JAX, in the precision it was trained in, measured when it was calibrated.',
    ]
  )


def _files(bundle: dict[str, Any]) -> str:
  lines = [
    '## Files',
    '',
    '`exits.json`: temperatures, thresholds, costs, what was measured. `classes.json`: a name a class, in the order of',
    'the outputs. `preprocessing.json`: how a picture becomes the input. `weights.safetensors`: what was learned, by',
    'path. `config.json`: how it was trained. `bundle.json`: every stage with its inputs and outputs, and the',
    'checksums of all files but this one.',
  ]
  if 'onnx' in bundle['formats']:
    lines += [
      '',
      'ONNX, any batch; images [batch, height, width, channel], features [batch, channel, height, width]:',
      '',
      '| file | takes | gives |',
      '|---|---|---|',
      *(_stage_row(spec) for spec in bundle['stages'].values()),
    ]
  if 'stablehlo' in bundle['formats']:
    lines += ['', '`*.stablehlo` are read by `jax.export.deserialize(bytes).call`; `bundle.json` has their signatures.']
  return '\n'.join(lines)


def _stage_row(spec: dict[str, Any]) -> str:
  gives = ', '.join(['logits', *filter(None, [_names(spec['gives'])])])
  return f'| {spec["file"]} | {_names(spec["takes"])} | {gives} |'


def _names(tensors: Sequence[dict[str, Any]]) -> str:
  return ', '.join(f'{tensor["name"]} {tensor["shape"]}'.replace("'", '') for tensor in tensors)


def _made(run: LoadedRun, plan: ExitPlan, bundle: dict[str, Any]) -> str:
  found = bundle.get('agreement')
  lines = [
    '## How it was made',
    '',
    f'Data: {run.dataset.name} {run.dataset.version}, {run.dataset.counts["train"]:,} training, '
    f'{run.dataset.counts["held_out"]:,} held-out and {run.dataset.counts["test"]:,} test images. '
    f'Licence of the data: {_licence(run)}.',
    '',
    f'Trained to step {run.step} from `config.json`, which trains it again when it lies alone in a folder:',
    '',
    '```bash',
    'python -m paranet_jax.main --workdir=FOLDER',
    f'{(plan.provenance or {}).get("command", "python -m paranet_jax.calibrate --workdir=FOLDER")}',
    '```',
    '',
    f'Versions: {", ".join(f"{name} {version}" for name, version in bundle["versions"].items())}.',
  ]
  if bundle['dtype'] == 'float16':
    lines.append('Weights are float16; ONNX Runtime casts them to float32 when it loads, and computes in float32.')
  if found:
    lines.append(f'Against the network in JAX, on {found["images"]:,} {found["of"]} images: {_agreement(found)}.')
  return '\n'.join(lines)


def _agreement(found: dict[str, Any]) -> str:
  if found['of'] == 'noise':  # On which the same labels and exits would say little of photographs.
    return f'logits differ by {found["logits"]:.1e} at most, in units of the largest'
  return f'{_percent(found["labels"])} % the same labels, {_percent(found["exits"])} % the same exits'


def _licence(run: LoadedRun) -> str:
  return LICENCES.get(run.config.data.name.split('/')[0].split(':')[0], _UNKNOWN_LICENCE)


def _percent(share: float | None) -> str:
  return '' if share is None else f'{100 * share:.2f}'
