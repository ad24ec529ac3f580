"""Runs the benchmarks one after the other, and writes the tables of docs/speed.md from their JSON.

Each result is kept in `benchmarks/results/NAME.json` with its command, machine, load, versions and date; tables are
only made from these files. `--render` writes the tables without measuring. The machine must be idle.

Some are measured in parts of about a minute, one after the other: `all.py deploy --part=2` measures the second again,
and keeps the rest of its file, for machines that are idle for no longer. The rest must be of the same machine and
versions. NAME_avx2 is measured on processors with AVX2 alone, and NAME on others.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import tables
from benchmarks.peers import EAGER, OURS_BFLOAT16, PACKAGES, TORCH_PEERS
from paranet_jax.display.tables import ABSENT
from paranet_jax.experiments import markdown
from paranet_jax.host.arguments import positive
from paranet_jax.host.errors import UserError, exit_code, say
from paranet_jax.host.machine import cpu_features, cpu_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / 'benchmarks/results', ROOT / 'docs/speed.md'

COMMANDS = {
  'train_step': ('train_step.py', '--rounds=5', '--no-linen'),
  'inference': ('inference.py', '--rounds=3', '--seconds=0.5', '--no-linen'),
  'dense_block': ('dense_block.py', '--rounds=3', '--seconds=0.3'),
  'early_exit': ('early_exit.py', '--rounds=2', '--seconds=0.2'),
  'deploy': ('deploy.py', '--rounds=2', '--seconds=0.2'),
  'deploy_pretrained': ('deploy.py', '--workdir=pretrained', '--rounds=2', '--seconds=0.2'),
  'service': ('service.py', '--seconds=3'),
  'first_step': ('first_step.py',),
  'compile_time': ('compile_time.py', '--rounds=2', '--no-linen'),
  'dtype_accuracy': ('dtype_accuracy.py',),
  'dtype_accuracy_cifar100': (
    *('dtype_accuracy.py', '--config=configs/paranet.py:PN3-ddd', '--set=model.layers_per_block=2'),
    *('--set=train.epochs=3', '--set=train.schedule=one_cycle', '--set=train.learning_rate=0.2'),
  ),
}
"""The program and flags of each benchmark."""
NARROW = {f'{name}_avx2': name for name in ('train_step', 'inference', 'dense_block')}
"""Those of processors with AVX2 and without AVX-512, whose results are kept beside the others, and what they repeat."""
COMMANDS |= {narrow: COMMANDS[name] for narrow, name in NARROW.items()}
POINTS = ('start', 'exit 1', 'exit 2', 'exit 3', 'budget 25%', 'budget 50%', 'budget 75%')
PARTS = {
  'early_exit': (
    *(('--no-programs', f'--batches={batch}') for batch in (1, 32, 256)),
    ('--programs', '--batches=none'),
  ),
  **{
    name: tuple((f'--folder=build/{name}', f'--points={point}') for point in POINTS)
    for name in ('deploy', 'deploy_pretrained')
  },
}
"""More flags for each part of the benchmarks that are measured in parts."""

Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  named = f'of {", ".join(COMMANDS)} (default: all of this processor)'
  parser.add_argument('names', nargs='*', metavar='NAME', help=named)
  parser.add_argument('--part', type=positive, help='only this part, from 1 on, of the one benchmark that is named')
  parser.add_argument('--render', action='store_true', help='write the tables, and measure nothing')
  options = parser.parse_args(argv)
  return exit_code(lambda: _run(options.names, options.render, options.part))


def _run(names: Sequence[str], render: bool, part: int | None = None) -> None:
  if unknown := [name for name in names if name not in COMMANDS]:
    raise UserError(f'expected names of {", ".join(COMMANDS)}, found {unknown[0]}; see --help')
  if part and (len(names) != 1 or part > len(PARTS.get(names[0], ()))):
    parts = ', '.join(f'{name}: 1 to {len(flags)}' for name, flags in PARTS.items())
    raise UserError(
      f'expected one benchmark and one of its parts ({parts}), found {" ".join(names) or "none"} --part={part}'
    )
  features = cpu_features()
  elsewhere = NARROW.values() if 'avx2' in features and 'avx512f' not in features else NARROW.keys()
  if not render and (other := next((name for name in names if name in elsewhere), None)):
    kind, twin = ('AVX2 alone', NARROW[other]) if other in NARROW else ('AVX-512', f'{other}_avx2')
    raise UserError(f'expected a processor with {kind} for {other}, found {cpu_name()}; measure {twin}')
  for name in () if render else names or (name for name in COMMANDS if name not in elsewhere):
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f'{name}.json'
    # All parts: what the file has may be of another machine, which may have had other peers.
    kept = json.loads(file.read_text()) if part and file.exists() else {}
    for flags in PARTS.get(name, ((),))[part - 1 if part else 0 : part]:
      found = measure(name, flags)
      if kept and (other := differing(kept, found)):
        raise UserError(
          f'expected a part that was measured as the rest of {file}, found another {other}; measure all: all.py {name}'
        )
      kept = merged(kept, found)
      file.write_text(json.dumps(kept, indent=1) + '\n')
  PAGE.write_text(rendered(PAGE.read_text(), results()))
  say(f'tables: {PAGE}')


def differing(kept: Result, found: Result) -> str:
  """In what the measurements of two results differ, so that they are no rows of one table; '': in nothing."""
  machines = [result['machine'] | {'load_average': None} for result in (kept, found)]
  names = [name for name in ('command', 'versions') if kept[name] != found[name]]
  return ', '.join(['machine'] * (machines[0] != machines[1]) + names)


def merged(kept: Result, found: Result) -> Result:
  """The result of all parts: what is found now replaces what is kept of the same part."""
  whole = kept | found
  for name in found.keys() & kept.keys():
    if name == 'rows':
      rows = {tuple(row.get(key) for key in ROW): row for row in [*kept[name], *found[name]]}
      whole[name] = list(rows.values())
      last = {row['peer']: row['one_image_ms'] for row in rows.values() if row['what'] == 'exit 3'}
      for row in whole[name]:
        if 'speedup' in row and row['peer'] in last:
          row['speedup'] = last[row['peer']] / row['one_image_ms']
      whole |= {value: whole[name][0][value] for value in HEADLINE if value in found}
    elif name in MERGED:
      whole[name] = kept[name] | found[name]
  return whole


ROW = ('what', 'peer', 'batch')
"""What tells rows of a benchmark in parts from each other."""
HEADLINE = ('ours', 'theirs', 'ratio')
"""Of the first row."""
MERGED = ('runtimes', 'break_even', 'of_program')


def measure(name: str, part: Sequence[str] = ()) -> Result:
  """The JSON of a benchmark, and its `command`.

  Args:
    part: more flags, of a part of it.

  Raises:
    UserError: it failed; what it said is on stderr.
  """
  program, *flags = COMMANDS[name]
  command = ' '.join(['python', f'benchmarks/{program}', *flags])
  say(' '.join([command, *part]))
  process = subprocess.run(
    [sys.executable, f'benchmarks/{program}', *flags, *part, '--json'], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  if process.returncode:
    raise UserError(f'expected {command} to succeed, found exit code {process.returncode}; see its message above')
  return {'command': command, **json.loads(process.stdout)}


def results() -> dict[str, Result]:
  """What was measured, by name."""
  return {name: json.loads(file.read_text()) for name in COMMANDS if (file := RESULTS / f'{name}.json').exists()}


def rendered(page: str, found: Mapping[str, Result]) -> str:
  """The page with the tables of these results between its marks `<!-- table NAME -->` and `<!-- end -->`."""
  for name, result in found.items():
    text = f'{provenance(result)}\n\n{TABLES[name](result)}'
    page = tables.put(page, f'<!-- table {name} -->', text, '<!-- end -->', f'the table {name} in {PAGE}')
  return page


def provenance(result: Result) -> str:
  """The command, the machine and the date, in a sentence, and what the result notes about them."""
  machine, versions = result['machine'], result['versions']
  peers = ''.join(f', {name} {versions[name]}' for name in PACKAGES if name in versions)
  note = f' {result["note"]}' if 'note' in result else ''
  cores = '1 core' if machine['cores'] == 1 else f'{machine["cores"]} cores'
  return (
    f'`{result["command"]}`, one run on {result["date"]}: {cores} of {machine["cpu"]} '
    f'({machine["features"]}), load average {machine["load_average"]} at its start, jax {versions["jax"]}{peers}.{note}'
  )


def compared(result: Result) -> str:
  """Ours, PyTorch as it is first written, and the fastest PyTorch; ratios above 1 mean that ours is faster.

  Where ours was measured in bfloat16 too, the fastest PyTorch is compared with both.
  """
  groups: dict[tuple, dict[str, dict[str, Any]]] = {}
  for row in result['rows']:
    if row['peer'] in (*TORCH_PEERS, OURS_BFLOAT16):
      groups.setdefault((row['what'], row['batch'], row['exit'], row['unit']), {})[row['peer']] = row
  lines = []
  columns = ['what', 'ours', 'PyTorch, eager', 'speed ratio', 'fastest PyTorch', 'speed ratio']
  halves = any(OURS_BFLOAT16 in peers for peers in groups.values())
  for (what, batch, exit, unit), peers in groups.items():
    half = peers.pop(OURS_BFLOAT16, None)
    speeds = {name: _faster(row['ours'], row['theirs'], unit) for name, row in peers.items()}
    best = min(speeds, key=lambda name: speeds[name])
    eager = peers[EAGER]
    fastest = f'{_number(peers[best]["theirs"])} ({best.replace("_", " ")})', _number(speeds[best])
    lines.append(
      [
        f'{what}, {f"exit {exit}" if exit else "all exits"}, batch {batch}, {unit}',
        *(_number(value) for value in (eager['ours'], eager['theirs'], speeds[EAGER])),
        *(fastest if len(peers) > 1 else ('', '')),
      ]
    )
    if half:
      ratio = _faster(half['theirs'], peers[best]['theirs'], unit)
      lines[-1] += [_number(half['theirs']), _number(ratio)]
  return markdown.table([*columns, *(('ours in bfloat16', 'speed ratio') if halves else ())], lines)


def early_exit(result: Result) -> str:
  """The speed-up over always the last exit, and what multiply-adds and latencies promise; then runtime and program."""
  columns = ('ratio', 'latency', 'macs')
  lines = [[row['what'], str(row['batch']), *(_number(row[name]) for name in columns)] for row in result['rows']]
  speedups = markdown.table(('operating point', 'batch', 'speed-up', 'by latencies', 'by multiply-adds'), lines)
  programs = result['of_program']
  of_program = markdown.table(
    ('exit', *(f'{number}' for number in programs)),
    [['runtime / one program for this exit, images/s', *(_number(value) for value in programs.values())]],
  )
  return f'{speedups}\n\n{of_program}'


def deploy(result: Result) -> str:
  """Images a second in batches of 64, milliseconds and joules for one image by runtime; then start, memory and size.

  First the accuracy on the images that were timed, if they have labels.
  """
  runtimes = list(result['runtimes'] or dict.fromkeys(row['peer'] for row in result['rows']))
  cells = {(row['what'], row['peer']): row for row in result['rows']}
  points = sorted(dict.fromkeys(row['what'] for row in result['rows']), key=POINTS.index)
  measured = [('images_per_s', 'images/s', 1), ('one_image_ms', 'ms for one image', 1)]
  if all(row.get('accuracy') is not None for row in result['rows']):
    measured.insert(0, ('accuracy', '% of the images right', 100))
  if all(row.get('one_image_joules') is not None for row in result['rows']):
    measured.append(('one_image_joules', 'J for one image', 1))
  lines = [
    [f'{point}, {unit}', *(_number(factor * cells[point, runtime][value]) for runtime in runtimes)]
    for value, unit, factor in measured
    for point in points
  ]
  for value, what in (('start_s', 'start, s'), ('peak_mb', 'peak memory, MB'), ('size_mb', 'size, MB')):
    if result['runtimes']:
      lines.append([what, *(_number(result['runtimes'][runtime][value]) for runtime in runtimes)])
  return markdown.table(('what', *runtimes), lines)


def service(result: Result) -> str:
  """The service at saturation beside run.py, then its latency at each rate, in times of a batch."""
  named = {
    'single images at saturation, images/s': 'service_per_s',
    'run.py, decoding and predicting the same files in batches, images/s': 'run_per_s',
    'share': 'share_of_run',
    'a batch of 64 by run.py, without decoding, ms': 'batch_ms',
    'its watch (`--watch`), % of that': 'watch_percent',
    'one image by run.py, ms': 'image_ms',
    'its watch, % of that': 'watch_image_percent',
  }
  rows = result['rows']
  lines = [[what, *(_number(row.get(field)) for row in rows)] for what, field in named.items()]
  for rates in zip(*(row['rates'] for row in rows), strict=True):
    offered = ' and '.join(f'{rate["offered_per_s"]:,.0f}' for rate in rates)
    latencies = [(rate['answered_p99_ms'], row['batch_ms']) for rate, row in zip(rates, rows, strict=True)]
    told = [f'{_number(p99)}, {_number(p99 / batch)}' for p99, batch in latencies]
    lines.append([f'99th percentile at {offered} images/s, ms and batches', *told])
  return markdown.table(('what', *(row['what'] for row in rows)), lines)


def first_step(result: Result) -> str:
  """Seconds from the command line to the end of the quickstart's first step."""
  starts = {what: [row['first_step_s'] for row in result['rows'] if row['what'] == what] for what in ('cold', 'warm')}
  lines = [
    [f'{what} start', _number(result[f'{what}_first_step_s']), ', '.join(map(_number, seconds))]
    for what, seconds in starts.items()
  ]
  return markdown.table(('the quickstart, from the command line to its first step', 's, median', 'each'), lines)


def compile_time(result: Result) -> str:
  """Seconds until the first step has ended, and of the evaluation's compilation."""
  facts = {
    'cold start to the end of the first step, s': 'cold_first_step_s',
    'warm start, s': 'warm_first_step_s',
    'compiling the evaluation of all exits, s': 'eval_s',
    'compiling the step ahead of time for TPU v5e:2x2, s': 'tpu_compile_s',
    'its code, MB': 'tpu_code_mb',
  }
  lines = [[what, _number(result[name])] for what, name in facts.items() if result[name] is not None]
  return markdown.table(('what', 'ours'), lines)


def dtype_accuracy(result: Result) -> str:
  """Test accuracy of each exit, as mean and standard deviation over the seeds."""

  def cell(values: Sequence[float]) -> str:
    return f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}'

  lines = []
  for row in result['rows']:
    away = '' if row['deviations'] is None else f'{row["deviations"]:+.2f}'
    lines.append([str(row['exit']), cell(row['float32']), cell(row['bfloat16']), f'{row["difference"]:+.2f}', away])
  return markdown.table(('exit', 'float32, %', 'bfloat16, %', 'difference, points', "in float32's deviations"), lines)


def dense_block(result: Result) -> str:
  """Milliseconds of a block by XLA and by our kernels, and the rates of their products; then the machine's."""
  columns = ('xla_ms', 'kernels_ms', 'ratio', 'xla_gflops', 'kernels_gflops')
  lines = [[row['what'], row['dtype'], *(_number(row[name]) for name in columns)] for row in result['rows']]
  blocks = markdown.table(
    ('block', 'type', 'XLA, ms', 'kernels, ms', 'speed ratio', 'XLA, GFLOP/s', 'kernels, GFLOP/s'), lines
  )
  facts = {
    'float32 product of 2048 x 2048, GFLOP/s': 'product_float32',
    'bfloat16 product, added up in float32, GFLOP/s': 'product_bfloat16',
    'copy of 256 MB by one thread, GB/s read and written': 'copy_1',
    'the same by two threads': 'copy_2',
  }
  rates = [[what, _number(result['rates'][name])] for what, name in facts.items()]
  return f'{blocks}\n\n{markdown.table(("the machine", "rate"), rates)}'


TABLES: dict[str, Callable[[Result], str]] = {
  'train_step': compared,
  'inference': compared,
  'dense_block': dense_block,
  'early_exit': early_exit,
  'deploy': deploy,
  'deploy_pretrained': deploy,
  'service': service,
  'first_step': first_step,
  'compile_time': compile_time,
  'dtype_accuracy': dtype_accuracy,
  'dtype_accuracy_cifar100': dtype_accuracy,
}
TABLES |= {narrow: TABLES[name] for narrow, name in NARROW.items()}


def _faster(ours: float, theirs: float, unit: str) -> float:
  return theirs / ours if unit == 'ms' else ours / theirs


def _number(value: float | None) -> str:
  if value is None:
    return ABSENT
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


if __name__ == '__main__':
  sys.exit(main())
