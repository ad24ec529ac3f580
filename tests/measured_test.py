"""Accuracies that pages quote are those of the JSON files that runs wrote."""

import json
import pathlib

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
REDUCED = 'results/tenth-model.layers_per_block=2/results.json'
MATCHING = 'results/queue-matching/results.json'
PAPER = 'results/queue-paper/results.json'
PRETRAINED = 'results/queue-pretrained/results.json'


def read(path):
  return json.loads((REPO / path).read_text())


def percent(share):
  return f'{100 * share:.2f}'


def mean(row):
  return f'{row["ours"]:.2f}' + (f' ± {row["std"]:.2f}' if row['std'] is not None else '')


def difference(row):
  if row['mean'] is None:
    return '—'  # Not run yet.
  return f'{row["mean"]:+.2f}' + (f' ± {row["std"]:.2f}' if row['std'] is not None else '')


def pretrained():
  """Accuracies of the exits, as a row of a table; accuracy and multiply-adds with the calibrated exits."""
  exits = ' | '.join(percent(row['accuracy']) for row in read('pretrained/summary.json')['exits'])
  early = read('pretrained/exits.json')['test']
  return exits, percent(early['accuracy']), f'{early["cost_macs"] / 1e6:.2f}'


def on_all():
  """Accuracies of the exits of the recipe of pretrained/ when it trains on all images."""
  return [mean(row) for row in read(PRETRAINED)['rows'] if row['run'] == 'final-on-all']


def reduced(table, network):
  rows = [row for row in read(REDUCED)['experiments'][table]['rows'] if row['network'] == network]
  return ', '.join(f'{row["ours"]:.2f}' for row in rows)


def gain(effect):
  """A mean difference, and in brackets those of the seeds."""
  return f'{effect.get("ours", effect.get("mean")):+.2f}', ', '.join(f'{value:+.2f}' for value in effect['each_seed'])


def cascade(exit_number):
  return gain(next(row for row in read(REDUCED)['experiments']['table1']['effects'] if row['exit'] == exit_number))


def by_matching():
  return gain(next(row for row in read(MATCHING)['comparisons'] if row['what'] == 'PN3-x3d - PN3-xdx'))


def matching(run, exit_number):
  return next(mean(row) for row in read(MATCHING)['rows'] if (row['run'], row['exit']) == (run, exit_number))


MATCHED = {
  'PN3-xdd': 'labels, and exit 3 from labels beside it (PN3-xdd)',
  'PN3-x3d': 'exit 3, which trains beside it (PN3-x3d)',
  'weight-0.1': 'the same, with a tenth of the weight',
  'weight-10': 'the same, with ten times the weight',
  'half-sum': 'the same, half the sum over the classes: 50 times the weight',
  'centered': 'the same, without the mean of the logits of an image',
  'kl-1': 'the same by KL divergence at temperature 1',
  'kl-4': 'the same by KL divergence at temperature 4',
  'kl-4-half-labels': 'half from labels, half by KL divergence at temperature 4',
  'labels-until-5': 'labels until epoch 5, then exit 3',
  'labels-until-10': 'labels until epoch 10, then exit 3',
  'nothing-until-5': 'nothing until epoch 5, then exit 3',
  'average-teacher': 'exit 3 of the averaged weights',
  'finished-teacher': 'exit 3 of a finished run, which does not change',
}


def by_target(run):
  """A row: what exit 2 gains against labels, in how many seeds, and the accuracy of exit 3."""
  found = next(row for row in read(MATCHING)['comparisons'] if row['what'] == f'{run} - PN3-xdx')
  return f'| {MATCHED[run]} | {difference(found)} | {len(found["each_seed"])} | {matching(run, 3)} |'


METHODS = {
  'plain': 'plain, %',
  'equilibrium': 'gradient equilibrium',
  'mixed': 'mixed regime',
  'distillation': 'distillation',
  'dfs': 'DFS',
  'boostnet': 'BoostNet',
}


def by_method(method):
  """A row: what a method changes at the first and the last exit of a network; of the plain one, its accuracies."""
  found, cells = read('results/queue-methods-short/results.json'), []
  for network, last in (('paranet', 3), ('msdnet', 7), ('ranet', 8)):
    for number in (1, last):
      if method == 'plain':
        wanted, rows = (f'{network}-plain', number), found['rows']
        cells += [mean(row) for row in rows if (row['run'], row['exit']) == wanted]
      else:
        wanted, rows = (f'{network}-{method} - {network}-plain', number), found['comparisons']
        cells += [difference(row) for row in rows if (row['what'], row['exit']) == wanted]
  return f'| {METHODS[method]} | {" | ".join(cells)} |'


def first_pipeline():
  return next(f'{row["ours"]:.2f}' for row in read(PAPER)['rows'] if row['run'] == 'PN3cut-dxx')


QUOTES = {
  'README.md': lambda: [
    f'| {pretrained()[0]} |',
    f'| {first_pipeline()} | | |',
    f'| {reduced("table1", "PN3-ddd").replace(", ", " | ")} |',
    f'({cascade(3)[0]} against +1.66 points)',
    f'({by_matching()[0]}) where the paper gains (+1.35)',
  ],
  'pretrained/README.md': lambda: [
    '| {} | {} |'.format(*pretrained()[:2]),
    f'| {pretrained()[2]} on average |',
    f'| trained on all 50,000 images (%) | {" | ".join(on_all())} |',
  ],
  'docs/paper.md': lambda: [
    f'| 1 | 50.39 +- 0.25 | {first_pipeline()} |',
    f'| PN3cut-ddd | 1, 2, 3 | 50.39, 65.58, 74.58 | {reduced("table1", "PN3cut-ddd")} |',
    f'| PN3-ddd | 1, 2, 3 | 48.23, 65.63, 76.24 | {reduced("table1", "PN3-ddd")} |',
    '| gain from the cascade | 3 | +1.66 | {} (seeds: {}) |'.format(*cascade(3)),
    f'| 65.67, 67.02 | {", ".join(matching(name, 2).partition(" ")[0] for name in ("PN3-xdx", "PN3-x3d"))} |',
    '| gain from logit matching | 2 | +1.35 | {} (seeds: {}) |'.format(*by_matching()),
    f'| labels (PN3-xdx) | {matching("PN3-xdx", 2)} % | 3 |',
    *map(by_target, MATCHED),
    f'| nothing, exit 3 alone is trained (PN3-xxd, the finished run) | | | {matching("teacher", 3)} |',
    *map(by_method, METHODS),
  ],
  'results/README.md': lambda: [
    f'{first_pipeline()} % with seed 0',
    *('| {} | {} ({})'.format(paper, *cascade(number)) for number, paper in enumerate(('-2.16', '+0.05', '+1.66'), 1)),
    '| +1.35 | {} ({})'.format(*by_matching()),
    'evaluated once: {}, {} and {} % at exits'.format(*on_all()),
    'has {}, {} and {} %.'.format(*pretrained()[0].split(' | ')),
  ],
}


@pytest.mark.parametrize('page', QUOTES)
def test_pages_quote_what_was_measured(page):
  text = (REPO / page).read_text()
  assert [quote for quote in QUOTES[page]() if quote not in text] == []
