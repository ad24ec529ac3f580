"""Simulates every promise of `calibrate` on draws from a population whose risks are known, and writes the table.

    python benchmarks/guarantees.py --draws=1000   # simulates, and writes benchmarks/results/guarantees.json
    python benchmarks/guarantees.py --table        # writes the table of docs/guarantees.md from that file

A draw is what one user has: held-out images, on one of whose `halves` anything may be chosen. A promise is broken in a
draw if it does not hold on the whole population. There are two: one of 5 classes, and one of 8 common classes and 200
rare ones, where most held-out images of a rare class are the only one. `plug-in` is what is chosen without a test: the
cheapest thresholds whose measured risk on the same images keeps the limit.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import tables
from paranet_jax.calibrate.measures import halves
from paranet_jax.early import promises
from paranet_jax.early.logits import Outputs
from paranet_jax.early.policies import risk
from paranet_jax.early.policies.shared import shared_thresholds
from paranet_jax.early.scores import confidences
from paranet_jax.early.thresholds import exits_taken
from paranet_jax.experiments import markdown
from paranet_jax.host.errors import exit_code
from paranet_jax.portable.run import Prediction, Watch, set_scores, softmax

REPO = Path(__file__).resolve().parents[1]
RESULTS, PAGE = REPO / 'benchmarks/results/guarantees.json', REPO / 'docs/guarantees.md'
BEFORE, AFTER = '<!-- made by benchmarks/guarantees.py --table -->', '<!-- end -->'
EPSILON, DELTA, COVERAGE = 0.05, 0.1, 0.9
ALPHA, STREAM = 0.01, 2560
POPULATION, HELD_OUT, CLASSES = 20_000, 1_000, 5
COMMON, RARE, RARE_SHARE = 8, 200, 0.3
"""Classes of the long tail, and the share of its images that are of rare ones."""
MISTAKEN, DOUBT = np.array([0.7, 0.55, 0.4]), 0.35
"""The share of the rare images that each exit takes for a common class, and how sure it is then: times this."""
COSTS = np.array([1.00, 3.62, 13.45]) / 13.45
"""Of the exits of PN3-ddd with 3 dense layers a block, as shares of the last one's."""


class World(NamedTuple):
  """Images with the logits of K exits, whose risks are known.

  Attributes:
    logits: [K, N, C]. labels: [N]. ranks: confidences [K, N]. losses: wrong where the last exit is right [K, N].
    held_out: how many images a draw has.
    kind: of the images, for the table.
  """

  logits: np.ndarray
  labels: np.ndarray
  ranks: np.ndarray
  losses: np.ndarray
  held_out: int = HELD_OUT
  kind: str = ''

  def take(self, rows: np.ndarray) -> 'World':
    """Some of the images."""
    parts = self.logits[:, rows], self.labels[rows], self.ranks[:, rows], self.losses[:, rows]
    return World(*parts, self.held_out, self.kind)


def make_world(seed: int = 0) -> World:
  """Exits that get surer and better, for images that are easy or hard."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, CLASSES, POPULATION)
  strength = np.linspace(1.2, 3.0, len(COSTS))[:, None, None] * rng.exponential(1.0, (POPULATION, 1))
  logits = 2.5 * (np.eye(CLASSES)[labels] * strength + 0.45 * rng.normal(size=(len(COSTS), POPULATION, CLASSES)))
  return _world(logits, labels)


def make_tail(seed: int = 0, population: int = 5_000) -> World:
  """Exits that take many images of rare classes for common ones: what is not tested on rare classes is not found."""
  rng = np.random.default_rng(seed)
  rare, classes = rng.random(population) < RARE_SHARE, COMMON + RARE
  labels = np.where(rare, rng.integers(COMMON, classes, population), rng.integers(0, COMMON, population))
  mistaken = rare & (rng.random(population) < MISTAKEN[:, None])
  seen_as = np.where(mistaken, rng.integers(0, COMMON, population), labels)
  strength = np.linspace(1.2, 3.0, len(COSTS))[:, None] * (0.5 + rng.exponential(1.0, population))
  strength[mistaken] *= DOUBT
  logits = 0.5 * rng.normal(size=(len(COSTS), population, classes))
  logits[np.arange(len(COSTS))[:, None], np.arange(population), seen_as] += 2.5 * strength
  return _world(logits, labels)._replace(held_out=240, kind=', many rare classes')


def _world(logits: np.ndarray, labels: np.ndarray) -> World:
  right = logits.argmax(-1) == labels
  losses = (right[-1] & ~right).astype(float)
  return World(logits, labels, confidences(logits, 'max_prob', np.ones(len(COSTS))), losses)


def marginal(_: World, tested: World) -> tuple[Any, Any]:
  """Thresholds with the promise, and of the plug-in."""
  plain = risk._last_within(tested.ranks, tested.losses, EPSILON * len(tested.labels))
  return tuple(
    shared_thresholds(each, len(COSTS)) for each in (risk.ltt(tested.ranks, tested.losses, EPSILON, DELTA), plain)
  )


def by_class(_: World, tested: World) -> tuple[Any, Any]:
  """Thresholds with the promise, and of the plug-in."""
  sure, few = risk.ltt_by_class(tested.ranks, tested.losses, tested.labels, EPSILON, DELTA)
  assert not few
  groups = [tested.take(np.flatnonzero(tested.labels == each)) for each in range(CLASSES)]
  plain = max(risk._last_within(each.ranks, each.losses, EPSILON * len(each.labels)) for each in groups)
  return tuple(shared_thresholds(each, len(COSTS)) for each in (sure, plain))


def selective(reference: World, tested: World) -> tuple[Any, Any]:
  """Thresholds with the promise, and of the plug-in."""
  path = risk.selective_path(reference.ranks, reference.losses, EPSILON, DELTA)
  within = [each for each in path if max(_early_risks(tested, each)) <= EPSILON]
  plain = min(within, key=lambda each: _cost(tested, each)) if within else shared_thresholds(np.inf, len(COSTS))
  return risk.ltt_selective(tested.ranks, tested.losses, path, EPSILON, DELTA), plain


def _taken(world: World, thresholds: np.ndarray) -> np.ndarray:
  return exits_taken(world.ranks, thresholds)


def _cost(world: World, thresholds: np.ndarray) -> float:
  return float(COSTS[_taken(world, thresholds)].mean())


def _lost(world: World, thresholds: np.ndarray) -> np.ndarray:
  taken = _taken(world, thresholds)
  return world.losses[taken, np.arange(len(taken))]


def _early_risks(world: World, thresholds: np.ndarray) -> list[float]:
  taken, lost = _taken(world, thresholds), _lost(world, thresholds)
  return [lost[taken == k].mean() if (taken == k).any() else 0.0 for k in range(len(COSTS) - 1)]


def _class_risks(world: World, thresholds: np.ndarray) -> list[float]:
  lost = _lost(world, thresholds)
  return [float(lost.mean()), *(lost[world.labels == each].mean() for each in range(CLASSES))]


RISKS: dict[str, tuple[str, Callable, Callable]] = {
  'marginal': ('`--risk`, of all images', marginal, lambda world, at: [_lost(world, at).mean()]),
  'selective': ('`--risk-of=selective`, at every early exit', selective, _early_risks),
  'class': ('`--risk-of=class`, of every class', by_class, _class_risks),
}


def simulate_risks(world: World, kind: str, draws: int, seed: int) -> dict[str, Any]:
  """How often a risk is above its limit, and the mean cost, with the promise and with the plug-in."""
  _, choose, risks = RISKS[kind]
  broken, costs = np.zeros((draws, 2), bool), np.zeros((draws, 2))
  for draw, (reference, tested) in enumerate(_draws(world, draws, seed)):
    for place, thresholds in enumerate(choose(reference, tested)):
      broken[draw, place] = max(risks(world, thresholds)) > EPSILON
      costs[draw, place] = _cost(world, thresholds)
  return {
    'promise': f'{RISKS[kind][0]}{world.kind}: at most {100 * EPSILON:g} %, with probability {1 - DELTA:g}',
    'limit': DELTA,
    **_named(broken.mean(axis=0), 'broken', 'plug_in_broken'),
    **_named(costs.mean(axis=0), 'cost', 'plug_in_cost'),
    'cost_of': 'multiply-adds, share of the last exit',
  }


def simulate_rejection(world: World, draws: int, seed: int) -> dict[str, Any]:
  """How often more of the answers are wrong than promised, and the share that is unknown."""
  # Of the long tail, early exits are wrong too often for any promise.
  thresholds = shared_thresholds(np.inf if world.kind else 2.5, len(COSTS))
  everything = _leaving(world, thresholds)
  broken, unknown = np.zeros((draws, 2), bool), np.zeros((draws, 2))
  for draw, (reference, tested) in enumerate(_draws(world, draws, seed)):
    images = _leaving(tested, thresholds)
    for place, at in enumerate(
      (
        promises.choose_rejection(_leaving(reference, thresholds), images, EPSILON, DELTA),
        _plug_in_rejection(images),
      )
    ):
      given = everything.early | (everything.confidence >= (np.inf if at is None else at))
      unknown[draw, place] = 1.0 if at is None else 1 - given.mean()
      broken[draw, place] = at is not None and everything.wrong[given].mean() > EPSILON
  share = f'{100 * EPSILON:g} %'
  return {
    'promise': f'`--reject`{world.kind}: at most {share} of the answers wrong, with probability {1 - DELTA:g}',
    'limit': DELTA,
    **_named(broken.mean(axis=0), 'broken', 'plug_in_broken'),
    **_named(unknown.mean(axis=0), 'cost', 'plug_in_cost'),
    'cost_of': 'images that are unknown',
  }


def _plug_in_rejection(images: promises.Leaving) -> float | None:
  levels = np.unique(images.confidence[~images.early])[::-1]
  wrong, given = promises._answered(images, levels)
  fits = np.flatnonzero(wrong <= EPSILON * given)
  return float(levels[fits[-1]]) if len(fits) else None


def _leaving(world: World, thresholds: np.ndarray) -> promises.Leaving:
  taken = _taken(world, thresholds)
  wrong = world.logits[taken, np.arange(len(taken))].argmax(-1) != world.labels
  return promises.Leaving(taken < len(COSTS) - 1, world.ranks[-1], wrong)


def simulate_sets(world: World, draws: int, seed: int) -> list[dict[str, Any]]:
  """How often a set lacks the right class: at the exit that is taken, the worst exit, and at any of all exits."""
  thresholds = shared_thresholds(1.0, len(COSTS))  # Low: early exits are wrong too often for sets of one class.
  everything, rows = _labeled(world, thresholds), np.arange(len(world.labels))
  scores_by = functools.cache(lambda *rule: np.stack([set_scores(each, *rule) for each in everything.probabilities]))
  missed, sizes, at_exits, anywhere, any_sizes = [], [], [], [], []
  for reference, tested in _draws(world, draws, seed):
    sets = promises.choose_sets(_labeled(reference, thresholds), _labeled(tested, thresholds), COVERAGE)
    scores = scores_by(sets['penalty'], sets['free'])
    limits = np.array([np.inf if limit is None else limit for limit in sets['limits']])
    held = scores[everything.taken, rows] <= limits[everything.taken][:, None]
    lacks = ~held[rows, everything.labels]
    missed.append(lacks.mean())
    at_exits.append([lacks[everything.taken == k].mean() for k in range(len(COSTS))])
    sizes.append(held.sum(-1).mean())
    inside = scores <= sets['anytime']
    anywhere.append((~inside[:, rows, everything.labels]).any(axis=0).mean())
    any_sizes.append(inside.all(axis=0).sum(-1).mean())
  worst = int(np.argmax(np.mean(at_exits, axis=0)))
  share = f'{100 * COVERAGE:g} %'
  row = {'limit': 1 - COVERAGE, 'cost_of': f'classes in a set, of {world.logits.shape[-1]}'}
  return [
    row | {'promise': f'`--coverage`{world.kind}: the set holds the right class, {share}'} | _missed(missed, sizes),
    row
    | {'promise': f'`--coverage`, among the images of each exit{world.kind}, {share} (the worst)'}
    | _missed(np.array(at_exits)[:, worst], sizes),
    row
    | {'promise': f'`anytime_sets`{world.kind}: all sets of an image hold it, {share}'}
    | _missed(anywhere, any_sizes),
  ]


def _missed(missed: Any, sizes: Any) -> dict[str, float]:
  return {
    'broken': float(np.mean(missed)),
    'error': float(np.std(missed) / np.sqrt(len(missed))),
    'cost': float(np.mean(sizes)),
  }


def _labeled(world: World, thresholds: np.ndarray) -> promises.Labeled:
  probabilities = np.stack([softmax(logits, 1.0) for logits in world.logits])
  return promises.Labeled(probabilities, world.labels, _taken(world, thresholds))


def simulate_watch(world: World, runs: int, seed: int) -> dict[str, Any]:
  """How often the watch alarms in a run of `STREAM` images like those that calibration saw."""
  thresholds = shared_thresholds(2.5, len(COSTS))
  taken = _taken(world, thresholds)
  probabilities = softmax(world.logits[taken, np.arange(POPULATION)], 1.0)
  tops, classes = probabilities.max(-1).astype(float), probabilities.argmax(-1)
  edges = [np.quantile(tops[taken == k], np.arange(1, 10) / 10) for k in range(len(COSTS))]
  places = np.array([np.searchsorted(edges[k], top, side='right') for k, top in zip(taken, tops, strict=True)])
  rows = list(zip((taken + 1).tolist(), tops.tolist(), classes.tolist(), strict=True))
  rng, alarms = np.random.default_rng(seed), 0
  for _ in range(runs):
    known = rng.integers(0, POPULATION, HELD_OUT)
    seen = {
      'images': HELD_OUT,
      'edges': [each.tolist() for each in edges],
      'counts': [np.bincount(places[known[taken[known] == k]], minlength=10).tolist() for k in range(len(COSTS))],
      'classes': np.bincount(classes[known], minlength=CLASSES).tolist(),
      'wrong': None,
    }
    watch = _watch(seen)
    watch.add([rows[row] for row in rng.integers(0, POPULATION, STREAM).tolist()])
    alarms += watch.alarm is not None
  promise = f'`--watch`: an alarm in a run without a change, {100 * ALPHA:g} % ({runs:,} runs of {STREAM:,} images)'
  return _false_alarms(promise, alarms, runs)


def simulate_labels(world: World, runs: int, seed: int) -> dict[str, Any]:
  """How often `Watch.record` alarms in a run of `STREAM` labels, of which as many are other than answered as before."""
  wrong = world.logits[-1].argmax(-1) != world.labels
  rng, alarms = np.random.default_rng(seed), 0
  answer = Prediction(0, np.zeros(CLASSES), 1, 1)
  for _ in range(runs):
    errors = int(wrong[rng.integers(0, POPULATION, HELD_OUT)].sum())
    counts = [[0] for _ in COSTS[1:]] + [[HELD_OUT]]
    seen = {'images': HELD_OUT, 'edges': [[] for _ in COSTS], 'counts': counts, 'classes': [HELD_OUT], 'wrong': errors}
    watch = _watch(seen)
    for label in wrong[rng.integers(0, POPULATION, STREAM)].astype(int).tolist():
      watch.record(label, answer)
    alarms += watch.alarm is not None
  return _false_alarms(f'`Watch.record`: the same for labels ({runs:,} runs of {STREAM:,} labels)', alarms, runs)


def _watch(seen: dict[str, Any]) -> Watch:
  """The watch of a bundle whose calibration saw this."""
  numbers = range(1, len(COSTS) + 1)
  return Watch(
    SimpleNamespace(_seen=seen, _identity=[], exits=tuple(numbers), macs=dict.fromkeys(numbers, 1), rejects=False),
    alpha=ALPHA,
  )


def _false_alarms(promise: str, alarms: int, runs: int) -> dict[str, Any]:
  return {'promise': promise, 'limit': ALPHA, 'draws': runs, 'broken': alarms / runs, 'cost': None, 'cost_of': ''}


def _draws(world: World, draws: int, seed: int) -> Iterator[tuple[World, World]]:
  """The images on which anything may be chosen and those that are tested, split as `calibrate` does."""
  rng = np.random.default_rng(seed)
  for _ in range(draws):
    rows = rng.integers(0, len(world.labels), world.held_out)
    parts = halves(Outputs(rows[None, :, None], world.labels[rows]))
    reference, tested = (world.take(part.logits[0, :, 0]) for part in parts)
    yield reference, tested


def _named(values: np.ndarray, *names: str) -> dict[str, float]:
  return dict(zip(names, values.tolist(), strict=True))


def allowed(row: dict[str, Any], draws: int) -> float:
  """The most that a simulation of a promise that holds may find: its limit and three standard errors."""
  draws = row.get('draws', draws)
  return row['limit'] + 3 * row.get('error', np.sqrt(row['limit'] * (1 - row['limit']) / draws))


def simulate(draws: int) -> dict[str, Any]:
  """All promises: `draws`, and `rows` with what each promised, how often it was broken, and what it costs."""
  world, tail = make_world(), make_tail()
  rows = [simulate_risks(world, kind, draws, seed) for seed, kind in enumerate(RISKS)]
  rows += [simulate_rejection(world, draws, 10), *simulate_sets(world, draws, 11)]
  rows += [simulate_risks(tail, 'marginal', draws, 14), simulate_rejection(tail, draws, 15)]
  rows += simulate_sets(tail, draws, 16)[:1]
  rows += [simulate_watch(world, 10 * draws, 12), simulate_labels(world, 10 * draws, 13)]
  return {'draws': draws, 'held_out': HELD_OUT, 'population': POPULATION, 'rows': rows}


def table(found: dict[str, Any]) -> str:
  """The rows as Markdown."""
  lines = []
  for row in found['rows']:
    plain = '' if 'plug_in_broken' not in row else f'{_percent(row["plug_in_broken"])}, {_amount(row, "plug_in_cost")}'
    most = _percent(allowed(row, found['draws']))
    lines.append([row['promise'], _percent(row['broken']), most, _amount(row, 'cost'), plain])
  return markdown.table(('promise', 'broken', 'at most', 'cost', 'without a test: broken, cost'), lines)


def _percent(share: float) -> str:
  return f'{100 * share:.1f} %'


def _amount(row: dict[str, Any], name: str) -> str:
  kind = row['cost_of']
  if row[name] is None:
    return kind
  if kind.startswith('classes'):
    return f'{row[name]:.2f} {kind}'
  short = 'of the multiply-adds' if kind.startswith('multiply') else 'unknown'
  return f'{100 * row[name]:.1f} % {short}'


def with_table(page: str, found: dict[str, Any]) -> str:
  """The page with the table in place of the one that it has."""
  return tables.put(page, BEFORE, table(found), AFTER, f'the table in {PAGE}')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--draws', type=int, default=1000)
  parser.add_argument('--table', action='store_true', help='only write the table')
  given = parser.parse_args(argv)
  return exit_code(lambda: _run(given))


def _run(given: argparse.Namespace) -> None:
  if not given.table:
    RESULTS.write_text(json.dumps(simulate(given.draws), indent=1) + '\n')
  found = json.loads(RESULTS.read_text())
  PAGE.write_text(with_table(PAGE.read_text(), found))
  print(table(found))


if __name__ == '__main__':
  sys.exit(main())
