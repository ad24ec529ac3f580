"""A report as one HTML file, which loads nothing."""

import json
import shlex
from pathlib import Path
from typing import Any

from paranet_jax import __version__
from paranet_jax.display.metrics import FILE_NAME as METRICS
from paranet_jax.display.pictures import drawn
from paranet_jax.display.tables import ABSENT, human_count
from paranet_jax.early.exit_plan import FULL, ExitPlan
from paranet_jax.early.sentences import is_another_network, not_promised, promises, shown_threshold, watch_sentence
from paranet_jax.early.units import measured_units, shown_cost
from paranet_jax.host.arguments import from_here
from paranet_jax.host.errors import printable
from paranet_jax.host.files import read_object, write_text
from paranet_jax.portable.run import BUNDLE
from paranet_jax.report.facts import Facts

_TEMPLATE = Path(__file__).with_name('page.html')


def write_page(out: Path, facts: Facts, command: str) -> int:
  """Writes the report atomically; returns its size in bytes.

  Args:
    command: that was given, for the page.
  """
  import jinja2

  template = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  ).from_string(_TEMPLATE.read_text(encoding='utf-8'))
  write_text(out, template.render(**page_values(facts, command)))
  return out.stat().st_size


def page_values(facts: Facts, command: str) -> dict[str, Any]:
  """What the template shows."""
  run, plan, data = facts.run, facts.plan, facts.data
  log = not facts.bundle and (facts.folder / METRICS).exists()
  no_log = 'A bundle has no log of its training.' if facts.bundle else f'The run has no {METRICS}.'
  return {
    'title': printable(f'{plan.name} on {plan.dataset}'),
    'what': _what(facts),
    'rows': exit_rows(facts),
    'headers': _headers(facts),
    'promises': _promises(facts),
    'curves': _drawn('curves_chart', facts.folder) if log else None,
    'no_curves': 'The figure could not be drawn.' if log else no_log,
    'reliability': None if data is None else _drawn('reliability_chart', data),
    **_budgets(facts),
    'images': facts.images,
    'labeled': data is None or data.labeled,
    'lacking': facts.lacking,
    'measures': _measures(plan),
    'commands': _commands(facts, command),
    'versions': ', '.join(f'{name} {version}' for name, version in (plan.provenance or {}).get('versions', {}).items()),
    'version': __version__,
    'pixelated': run.image_shape[0] < 64,
  }


def _what(facts: Facts) -> str:
  run = facts.run
  height, width, channels = run.image_shape
  exits = len(facts.plan.exits)
  return (
    f'{exits} exit{"s" * (exits > 1)}, {len(run.dataset.class_names):,} classes, images of {height} × {width} pixels '
    f'and {channels} channel{"s" * (channels > 1)}; step {run.step:,}'
  )


def _promises(facts: Facts) -> list[str]:
  lines, watch = promises(facts.plan), watch_sentence(facts.plan)
  if not facts.bundle:
    return lines
  bundle = read_object(facts.folder / BUNDLE, 'export the bundle again') or {}
  if facts.plan.policy != FULL and is_another_network(bundle):
    of = f'All figures here are of the network in {bundle["calibrated_dtype"]}, too.'
    return [f'{not_promised(bundle)} {of}', *lines]
  return [*lines, *([watch.replace('`', '')] if watch else [])]


def _kind(facts: Facts) -> str:
  """What is measured: 'accuracy', or 'agreement' with the last exit where images have no labels."""
  unlabeled = 'agreement' in (facts.plan.test or {}) or (facts.data is not None and not facts.data.labeled)
  return 'agreement' if unlabeled else 'accuracy'


def _headers(facts: Facts) -> tuple[str, ...]:
  kind = _kind(facts)
  headers = 'exit', 'multiply-adds', f'{kind} on all images', 'exits from', 'images that exit', f'{kind} there'
  return *headers, *measured_units(facts.plan)


def exit_rows(facts: Facts) -> list[tuple[str, ...]]:
  """The cells of the table of exits: test images, as calibration measured them or as they were measured now."""
  plan, data, kind = facts.plan, facts.data, _kind(facts)
  tested = plan.test or {}
  nothing = [None] * len(plan.exits)
  if tested:
    alone, shares = tested.get(f'exit_{kind}') or nothing, tested.get('shares') or nothing
    there = [row.get(kind) for row in tested.get('exits', [])] or nothing
  elif data is not None:
    alone, shares, there = (list(each['test']) for each in (data.accuracy, data.shares, data.accuracy_there))
  else:
    alone = shares = there = nothing
  rows = []
  for k, number in enumerate(plan.exits):
    row = str(number), human_count(plan.macs_alone[k]), _percent(alone[k]), _from(plan, k), _percent(shares[k])
    row = (*row, _percent(there[k]))
    rows.append((*row, *(shown_cost(getattr(plan, unit)[k], unit) for unit in measured_units(plan))))
  return rows


def _from(plan: ExitPlan, k: int) -> str:
  if k == len(plan.exits) - 1:
    return 'the rest'
  return shown_threshold(plan, k, f'{plan.score.replace("max_prob", "probability")} ').replace('equal', 'equal answers')


def _percent(share: float | None) -> str:
  return ABSENT if share is None or share != share else f'{100 * share:.2f} %'


def _drawn(name: str, *arguments: Any) -> Any:
  """A chart; None if matplotlib cannot draw it."""

  def draw() -> Any:
    from paranet_jax.report import charts

    return charts.in_page_style(getattr(charts, name))(*arguments)

  found = drawn(draw)
  return None if isinstance(found, str) and found.startswith('not drawn') else found


def _budgets(facts: Facts) -> dict[str, Any]:
  """The chart of budgets, and what its slider says at each point."""
  found = None if facts.data is None else _drawn('budget_chart', facts.data)
  if facts.data is None or found is None:
    return {'budget': None, 'points': '', 'start': 0, 'last_point': 0}
  chart, points = found
  last, alone = facts.plan.exits[-1], float(facts.data.alone[-1])
  calibrate = f'python -m paranet_jax.calibrate --workdir={_shown(facts.folder)}'
  score = '' if facts.plan.score == 'max_prob' else f' --score={facts.plan.score}'  # Whose curve this is.
  texts = [
    {
      'x': round(point.x, 2),
      'y': round(point.y, 2),
      'text': f'{human_count(round(point.cost))} multiply-adds an image, {100 * point.cost / alone:.1f} % of '
      f'the cost of exit {last} alone: {100 * point.accuracy:.2f} % {_kind(facts)} on test images',
      'command': None if facts.bundle else f'{calibrate} --budget={point.cost:.0f}{score}',
    }
    for point in points
  ]
  chosen = float(facts.data.chosen['test'].cost[0])
  start = min(range(len(points)), key=lambda place: abs(points[place].cost - chosen))
  script = json.dumps(texts).replace('<', '\\u003c')  # It cannot end the script.
  return {'budget': chart, 'points': script, 'start': start, 'last_point': len(points) - 1}


def _measures(plan: ExitPlan) -> list[tuple[str, str]]:
  """Costs of an image, in words and numbers."""
  found = [(f'exit {plan.exits[-1]} alone', f'{human_count(plan.macs_alone[-1])} multiply-adds')]
  for split, words in ((plan.expected, 'held-out images'), (plan.test, 'test images')):
    if split and split.get('cost_macs'):
      cost = split['cost_macs']
      share = f'{100 * cost / plan.macs_alone[-1]:.1f} % of it'
      found.append((f'mean of {words}', f'{human_count(round(cost))} multiply-adds, {share}'))
    for unit in measured_units(plan):
      if split and split.get(f'cost_{unit}'):
        found.append((f'mean of {words}', f'{shown_cost(split[f"cost_{unit}"], unit)} {unit}'))
  if audit := plan.audit:
    for words, name in (
      (f'mean with {audit["hardest"]["name"]}', 'hardest'),
      ('mean under a slowdown attack', 'attack'),
    ):
      cost = audit[name]['cost_macs']
      factor = f'{cost / audit["clean"]["cost_macs"]:.2f} times that of {audit["images"]:,} test images'
      found.append((words, f'{human_count(round(cost))} multiply-adds, {factor}'))
  if plan.latency:
    where = (plan.provenance or {}).get('cpu', plan.latency.get('device'))
    found.append(('milliseconds were measured on', f'{where}'))
    if energy := plan.latency.get('energy'):
      found.append(('joules were measured by', f'{", ".join(map(str, energy))}; all programs and idle power count'))
  return found


def _commands(facts: Facts, command: str) -> list[tuple[str, str]]:
  where = _shown(facts.folder)
  calibrate = (facts.plan.provenance or {}).get('command')
  found = [
    ('train it again, with its config.json copied into an empty folder', 'python -m paranet_jax.main --workdir=FOLDER'),
    *([('calibrate it', str(calibrate))] if calibrate and facts.plan.policy != FULL else []),
  ]
  if facts.bundle:
    found.append(('predict', f'python {_shown(facts.folder / "run.py")} IMAGES'))
  else:
    found.append(('predict', f'python -m paranet_jax.predict --workdir={where} IMAGES'))
    found.append(('export it', f'python -m paranet_jax.export --workdir={where} --out=BUNDLE'))
  return [*found, ('write this report again', command)]


def _shown(path: Path) -> str:
  """A path for a shell."""
  return shlex.quote(str(from_here(path)))
