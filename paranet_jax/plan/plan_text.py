"""A plan as text, and as one JSON object."""

from typing import Any

from paranet_jax.display.progress import human_duration
from paranet_jax.display.tables import align, rounded
from paranet_jax.plan.plan import Plan
from paranet_jax.plan.step import StepFacts


def as_text(plan: Plan) -> str:
  """The plan in plain text, with its assumptions at the end."""
  task, facts, count = plan.task, plan.facts, len(plan.target.devices)
  title = (
    f'{task.config.name} on {task.config.data.name}: a training step of {facts.batch_size:,} images on '
    f'{plan.target.name}, {facts.batch_size // count:,} per device'
  )
  compiled = ', '.join(f'{name} {version}' for name, version in plan.versions.items())
  lines = [title, f'compiled in {facts.compile_seconds:.0f} s with {compiled}']
  if facts.batch_size != plan.asked:
    lines.insert(0, f'a step of {plan.asked:,} images does not fit; the batch was halved until it did')
  sections = (_memory(plan), _work(facts), _time(plan), _assumptions(plan))
  return '\n'.join([*lines, *(f'\n{section}' for section in sections)])


def as_json(plan: Plan) -> dict[str, Any]:
  """The plan in bytes and seconds; memory, work and traffic are per device."""
  facts, estimate = plan.facts, plan.estimate
  return {
    'name': plan.task.config.name,
    'dataset': plan.task.config.data.name,
    'topology': plan.target.topology,
    'devices': {'count': len(plan.target.devices), 'kind': plan.target.devices[0].device_kind},
    'batch_size': facts.batch_size,
    'fits': facts.batch_size == plan.asked and facts.memory <= plan.chip.memory,
    'memory': {
      'arguments': facts.arguments,
      'temporary': facts.temporary,
      'code': facts.code,
      'needed': facts.memory,
      'available': plan.chip.memory,
    },
    'flops': facts.flops,
    'memory_traffic_bytes': facts.traffic,
    'collectives': facts.collectives._asdict(),
    'estimate_s': estimate._asdict() | {'step': estimate.step, 'run': estimate.step * plan.task.total_steps},
    'measured_step_s': plan.measured,
    'total_steps': plan.task.total_steps,
    'largest_batch': plan.largest,
    'largest_batch_from': [one.batch_size for one in (facts, plan.other) if one],
    'compile_s': facts.compile_seconds,
    'peaks': {'flops': plan.chip.flops, 'bandwidth': plan.chip.bandwidth, 'links': plan.chip.links},
    'peaks_source': plan.chip.source,
    'versions': plan.versions,
  }


def _memory(plan: Plan) -> str:
  facts, chip = plan.facts, plan.chip
  rows = [
    ('state, data set and order', _bytes(facts.arguments)),
    ('temporary', _bytes(facts.temporary)),
    ('code', _bytes(facts.code) if facts.code else 'unknown'),
    ('total', _bytes(facts.memory)),
    ('available', 'unknown' if plan.largest is None else _bytes(chip.memory)),
  ]
  if plan.largest is None:  # Such as a GPU with another allocator.
    return '\n'.join(align(('memory per device', ''), rows, left=(0,)))
  verdict = f'{100 * facts.memory / chip.memory:.1f} % used' if facts.memory <= chip.memory else 'does not fit'
  largest = f'largest batch that fits: {plan.largest:,} images'
  if plan.largest == len(plan.task.dataset.train) // len(plan.target.devices) * len(plan.target.devices):
    largest += ', the whole data set'
  if plan.other:
    largest += f' (extrapolated from steps compiled for {facts.batch_size:,} and {plan.other.batch_size:,} images)'
  return '\n'.join([*align(('memory per device', ''), rows, left=(0,)), verdict, largest])


def _work(facts: StepFacts) -> str:
  rows = [
    ('floating-point operations', f'{rounded(facts.flops / 1e9)} G'),
    ('main memory traffic', _bytes(facts.traffic)),
    ('collectives', f'{_bytes(facts.collectives.size)} in {facts.collectives.count}'),
  ]
  return '\n'.join(align(('step, per device', ''), rows, left=(0,)))


def _time(plan: Plan) -> str:
  estimate, steps = plan.estimate, plan.task.total_steps
  rows = [
    ('arithmetic at peak', _milliseconds(estimate.arithmetic), '', ''),
    ('main memory at peak', _milliseconds(estimate.memory), '', ''),
    ('collectives', _milliseconds(estimate.collectives), '', ''),
    _step_row(plan, 'step, roofline bound', estimate.step),
  ]
  if estimate.compiler is not None:
    rows.append(_step_row(plan, "step, compiler's estimate", estimate.compiler))
  if plan.measured is not None:
    rows.append(_step_row(plan, 'step, measured', plan.measured))
  lines = align(('time', 'ms', 'images/s', f'{steps:,} steps'), rows, left=(0,))
  if plan.measured is not None:
    lines.append(f'measured / bound: {plan.measured / estimate.step:.2f}')
  return '\n'.join(lines)


def _step_row(plan: Plan, what: str, seconds: float) -> tuple[str, str, str, str]:
  speed = rounded(plan.facts.batch_size / seconds)
  return what, _milliseconds(seconds), speed, human_duration(seconds * plan.task.total_steps)


def _assumptions(plan: Plan) -> str:
  chip = plan.chip
  links = '' if chip.links is None else f', {chip.links / 1e9:.4g} GB/s sent to other chips'
  lines = [
    'assumptions:',
    f'- a device does {chip.flops / 1e12:.3g} TFLOP/s and moves {chip.bandwidth / 1e9:.4g} GB/s{links} ({chip.source})',
    '- roofline bound: arithmetic and main memory overlap, both at their peak; collectives are added',
    '- only convolutions and matrix products count as operations; each instruction reads its operands from and writes',
    '  its results to main memory, without caches',
    '- the latency of collectives and of starting instructions is ignored, so small batches are slower than this',
  ]
  if chip.links is None and plan.facts.collectives.count:
    lines.append('- devices of one machine: collectives take no time')
  if plan.estimate.compiler is not None and chip.clock:
    lines.append(
      f"- the compiler's estimate counts the cycles of a {chip.clock / 1e9:.2f} GHz core, without waiting for others"
    )
  lines.append('- the time of a run includes its steps only, not compiling, evaluating or saving')
  if len(plan.task.phases) > 1:
    lines.append(f'- every step costs as much as in the last phase of train.regime={plan.task.config.train.regime}')
  return '\n'.join(lines)


def _milliseconds(seconds: float) -> str:
  return rounded(1000 * seconds)


def _bytes(number: float) -> str:
  for unit, size in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if number >= size:
      return f'{rounded(number / size)} {unit}'
  return f'{number:.0f} bytes'
