"""Tests of the flags of `python -m paranet_jax.calibrate`."""

from pathlib import Path

import pytest
from running import run_command

from paranet_jax.calibrate.__main__ import main
from paranet_jax.calibrate.flags import parse, parse_budget


@pytest.mark.parametrize(
  ('text', 'budget'),
  [
    ('30M', (30e6, 'macs')),
    ('30m', (30e6, 'macs')),
    ('30e6', (30e6, 'macs')),
    ('30000000', (30e6, 'macs')),
    ('0.5G', (5e8, 'macs')),
    ('1.5k', (1500.0, 'macs')),
    ('2.5ms', (2.5, 'ms')),
    ('.5 MS', (0.5, 'ms')),
    ('2.5e-1ms', (0.25, 'ms')),
    ('0.5J', (0.5, 'joules')),
    ('20 mj', (0.02, 'joules')),
    ('32.631277M', (32_631_277.0, 'macs')),  # 32.631277 * 10^6 is 32,631,276.999999996.
  ],
)
def test_budgets(text, budget):
  assert tuple(parse_budget(text).values()) == budget


def test_defaults():
  request = parse(['--workdir=runs/a', '--budget=30M'])
  assert request.workdir == Path('runs/a').absolute()
  assert (request.score, request.policy.name) == ('max_prob', 'optimal')
  assert request.target == {'budget': 30e6, 'unit': 'macs'}
  assert (request.step, request.batch_size, request.curves) == (None, None, False)
  assert request.temperature == 'nll'
  risk = parse(['--workdir=a', '--risk=0.02'])
  assert risk.target == {'risk': 0.02, 'guarantee': 'ltt', 'delta': 0.1, 'loss': 'gap'}
  assert parse(['--workdir=a', '--risk=0.02', '--policy=ltt']) == parse(
    ['--workdir=a', '--risk=0.02', '--guarantee=ltt']
  )
  assert (request.reject, request.coverage, request.promises) == (None, None, False)
  promising = parse(['--workdir=a', '--budget=3M', '--reject=0.02', '--delta=0.2', '--coverage=0.9'])
  assert (promising.reject, promising.delta, promising.coverage) == (0.02, 0.2, 0.9)
  assert promising.promises and promising.target == {'budget': 3e6, 'unit': 'macs'}
  capped = parse(['--workdir=a', '--budget=3M', '--max-macs=5M'])
  assert (capped.most, capped.target) == ((5e6, 'macs'), {'budget': 3e6, 'unit': 'macs', 'max_macs': 5e6})
  for text in ('2.5', '2.5ms'):
    capped = parse(['--workdir=a', '--threshold=0.9', f'--max-ms={text}'])
    assert (capped.most, capped.target, capped.batch_size) == ((2.5, 'ms'), {'threshold': 0.9, 'max_ms': 2.5}, 1)
  assert parse(['--workdir=a', '--budget=1ms']).batch_size == 1
  assert parse(['--workdir=a', '--budget=1ms', '--batch-size=32']).batch_size == 32
  joules = parse(['--workdir=a', '--budget=0.5J'])
  assert joules.target == {'budget': 0.5, 'unit': 'joules', 'batch_size': 1} and joules.measured_unit == 'joules'
  assert (request.audit, request.measured_unit, risk.measured_unit) == (False, None, None)


NOT_A_BUDGET = (
  'argument --budget: expected multiply-adds such as 30M, a time such as 2.5ms or an energy such as 0.5J, found '
  "'{}'; see --help"
)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'one of the arguments --budget --risk --threshold is required; see --help'),
    (['--budget=3M', '--risk=0.1'], 'argument --risk: not allowed with argument --budget; see --help'),
    *(
      ([f'--budget={text}'], NOT_A_BUDGET.format(text))
      for text in '|0|-3M|3 tons|2.5s|inf|nan|1e999|1e9999M|1e-9999M|1e99999|M|3MM'.split('|')
    ),
    *(
      ([f'--risk={text}'], f'argument --risk: expected a number between 0 and 1, found {text}; see --help')
      for text in ('0', '1', 'nan', 'small')
    ),
    (
      ['--budget=1ms', '--batch-size=0'],
      'argument --batch-size: expected an integer of 1 or more, found 0; see --help',
    ),
    (['--risk=0.1', '--delta=0'], 'argument --delta: expected a number between 0 and 1, found 0; see --help'),
    (
      ['--risk=0.1', '--risk-loss=mse'],
      'argument --risk-loss: must be one of gap, disagreement, found mse; see --help',
    ),
    (
      ['--threshold=1', '--temperature=brier'],
      "argument --temperature: invalid choice: 'brier' (choose from 'nll', 'ece', 'none'); see --help",
    ),
    (
      ['--risk=0.1', '--risk-of=images'],
      'argument --risk-of: must be one of marginal, selective, class, found images; see --help',
    ),
    (
      ['--risk=0.1', '--guarantee=crc', '--risk-of=class'],
      '--risk-of belongs to --policy=ltt, found crc; leave out --risk-of',
    ),
    (['--threshold=1', '--reject=2'], 'argument --reject: expected a number between 0 and 1, found 2; see --help'),
    (['--budget=3M', '--coverage=90'], 'argument --coverage: expected a number between 0 and 1, found 90; see --help'),
    (
      ['--threshold=2', '--reject=0.1', '--score=patience'],
      '--reject needs a score that ranks images, found --score=patience; leave one of them out',
    ),
    (
      ['--risk=0.1', '--max-macs=5M'],
      '--max-macs belongs to --budget or --threshold, found --risk, which compares with the last exit; '
      'leave one of them out',
    ),
    (
      ['--threshold=1', '--max-macs=5ms'],
      "argument --max-macs: expected multiply-adds such as 30M, found '5ms'; see --help",
    ),
    (
      ['--threshold=1', '--max-macs=5M', '--max-ms=1'],
      'argument --max-ms: not allowed with argument --max-macs; see --help',
    ),
    (['--threshold=high'], "argument --threshold: invalid float value: 'high'; see --help"),
    (['--threshold=1', '--step=last'], "argument --step: invalid int value: 'last'; see --help"),
    *(
      ([f'--threshold={text}'], f'expected a threshold from 0 to 1 for --score=max_prob, found {text}; set --threshold')
      for text in ('-0.1', '1.1', 'nan')
    ),
    *(
      (
        ['--score=patience', f'--threshold={text}'],
        f'expected 1 or more equal predictions in a row for --score=patience, found {text}; set --threshold',
      )
      for text in ('0', '0.9', '1.5', 'nan', 'inf')
    ),
    (['--budget=3M', '--policy=best'], "unknown policy 'best', expected one of optimal, quota, shared; set --policy"),
    (['--risk=0.1', '--guarantee=pac'], "unknown guarantee 'pac', expected one of ltt, crc; set --guarantee"),
    (['--budget=3M', '--guarantee=ltt'], '--guarantee belongs to risk control; set --risk, or leave it out'),
    (
      ['--risk=0.1', '--guarantee=ltt', '--policy=ltt'],
      '--guarantee is the --policy for --risk, found both; leave one of them out',
    ),
    (
      ['--threshold=1', '--policy=quota'],
      '--policy=quota belongs to --budget, found --threshold; leave one of them out',
    ),
    (
      ['--threshold=1', '--delta=0.1'],
      '--delta belongs to --policy=ltt or to --reject, found shared; leave out --delta',
    ),
    (
      ['--budget=3M', '--risk-loss=gap'],
      '--risk-loss belongs to --policy=ltt or crc, found optimal; leave out --risk-loss',
    ),
    (
      ['--risk=0.1', '--guarantee=crc', '--delta=0.1'],
      '--delta belongs to --policy=ltt or to --reject, found crc; leave out --delta',
    ),
    (
      ['--risk=0.1', '--score=patience'],
      '--risk needs a score that ranks images, found --score=patience; leave one of them out',
    ),
    (
      ['--budget=3M', '--policy=quota', '--score=patience'],
      '--policy=quota with --budget needs a score of max_prob or entropy or margin, found patience; set --score',
    ),
    (['--budget'], 'argument --budget: expected one argument; see --help'),
    (['--threshold=1', '--budgt=3M'], 'unrecognized arguments: --budgt=3M; see --help'),
  ],
)
def test_rejected(arguments, message):
  assert run_command(main, '--workdir=/none', *arguments) == (2, '', f'error: {message}\n')


def test_an_unknown_score():
  code, _, err = run_command(main, '--workdir=/none', '--threshold=1', '--score=energy')
  assert code == 2 and err.startswith("error: argument --score: invalid choice: 'energy' (choose from ")


def test_no_workdir():
  error = 'error: the following arguments are required: --workdir; see --help\n'
  assert run_command(main, '--threshold=0.9') == (2, '', error)
