"""The tables of docs/speed.md, made from the JSON of the benchmarks."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import all as all_benchmarks
from benchmarks import dtype_accuracy
from paranet_jax.host.errors import UserError

MACHINE = {'cpu': 'Test CPU', 'cores': 2, 'features': 'avx2', 'load_average': 0.1}
RESULT = {
  'command': 'python benchmarks/train_step.py',
  'machine': MACHINE,
  'versions': {'jax': '0.10.2', 'torch': '2.13.0'},
  'date': '2026-11-29',
}
WHERE = (
  '`python benchmarks/train_step.py`, one run on 2026-11-29: 2 cores of Test CPU (avx2), load average 0.1 at its '
  'start, jax 0.10.2, torch 2.13.0.'
)


@pytest.fixture(autouse=True)
def processor_with_avx512(monkeypatch):
  monkeypatch.setattr(all_benchmarks, 'cpu_features', lambda: {'avx2', 'avx512f'})


def row(what, peer, ours, theirs, unit):
  return {'what': what, 'peer': peer, 'batch': 64, 'exit': None, 'ours': ours, 'theirs': theirs, 'unit': unit}


def test_the_fastest_peer_is_named():
  rows = [
    row('step', 'eager', 80.0, 40.0, 'images/s'),
    row('step', 'eager_bfloat16', 80.0, 100.0, 'images/s'),
    row('step', 'linen', 80.0, 1000.0, 'images/s'),  # Not PyTorch.
    row('two devices', 'eager', 60.0, 40.0, 'images/s'),  # Compared with one peer only.
    row('one image', 'eager', 5.0, 20.0, 'ms'),
    row('one image', 'eager_huge_pages', 5.0, 15.0, 'ms'),
  ]
  assert all_benchmarks.compared({'rows': rows}).splitlines()[2:] == [
    '| step, all exits, batch 64, images/s | 80 | 40 | 2 | 100 (eager bfloat16) | 0.8 |',
    '| two devices, all exits, batch 64, images/s | 60 | 40 | 1.5 |  |  |',
    '| one image, all exits, batch 64, ms | 5 | 20 | 4 | 15 (eager huge pages) | 3 |',
  ]


def test_bfloat16_is_compared_with_the_fastest_peer():
  rows = [
    row('forward', 'ours_bfloat16', 80.0, 300.0, 'images/s'),
    row('forward', 'eager', 80.0, 40.0, 'images/s'),
    row('forward', 'eager_bfloat16', 80.0, 100.0, 'images/s'),
    row('one image', 'ours_bfloat16', 5.0, 4.0, 'ms'),
    row('one image', 'eager', 5.0, 20.0, 'ms'),
    row('one image', 'eager_bfloat16', 5.0, 10.0, 'ms'),
  ]
  header, _, *lines = all_benchmarks.compared({'rows': rows}).splitlines()
  assert header.endswith('| fastest PyTorch | speed ratio | ours in bfloat16 | speed ratio |')
  assert lines == [
    '| forward, all exits, batch 64, images/s | 80 | 40 | 2 | 100 (eager bfloat16) | 0.8 | 300 | 3 |',
    '| one image, all exits, batch 64, ms | 5 | 20 | 4 | 10 (eager bfloat16) | 2 | 4 | 2.5 |',
  ]


def test_only_what_is_between_the_marks_is_replaced():
  result = RESULT | {'rows': [row('step', 'eager', 80.0, 40.0, 'images/s')]}
  page = 'before\n<!-- table train_step -->\nold\n<!-- end -->\nafter\n<!-- table deploy -->\n<!-- end -->\n'
  assert all_benchmarks.provenance(result | {'note': 'Busy.'}) == f'{WHERE} Busy.'
  once = all_benchmarks.rendered(page, {'train_step': result})
  assert once.startswith(f'before\n<!-- table train_step -->\n\n{WHERE}\n\n| what |')
  assert 'old' not in once and once.endswith('|\n\n<!-- end -->\nafter\n<!-- table deploy -->\n<!-- end -->\n')
  assert all_benchmarks.rendered(once, {'train_step': result}) == once
  with pytest.raises(UserError, match='expected the marks of the table train_step in .*speed.md, found none; put them'):
    all_benchmarks.rendered('no marks', {'train_step': result})


def test_other_tables():
  early = {
    'rows': [{'what': 'budget 50%', 'batch': 1, 'ratio': 1.9, 'latency': 2.0, 'macs': 2.1}],
    'of_program': {'1': 0.9, '2': 0.95},
  }
  assert '| budget 50% | 1 | 1.9 | 2 | 2.1 |' in all_benchmarks.early_exit(early)
  assert '| runtime / one program for this exit, images/s | 0.9 | 0.95 |' in all_benchmarks.early_exit(early)
  deployed = {
    'rows': [{'what': 'exit 1', 'peer': 'ours', 'images_per_s': 2500.0, 'one_image_ms': 0.5}],
    'runtimes': {'ours': {'start_s': 3.0, 'peak_mb': 300.0, 'size_mb': 9.5}},
  }
  assert all_benchmarks.deploy(deployed).splitlines()[2:] == [
    '| exit 1, images/s | 2,500 |',
    '| exit 1, ms for one image | 0.5 |',
    '| start, s | 3 |',
    '| peak memory, MB | 300 |',
    '| size, MB | 9.5 |',
  ]
  deployed['rows'][0]['accuracy'] = 0.664
  assert all_benchmarks.deploy(deployed).splitlines()[2] == '| exit 1, % of the images right | 66.4 |'
  served = {'what': 'small', 'service_per_s': 2000.0, 'run_per_s': 2500.0, 'share_of_run': 0.8, 'batch_ms': 8.0}
  served |= {'image_ms': 0.75, 'rates': [{'offered_per_s': 1000.0, 'answered_p99_ms': 20.0}]}
  calibrated = served | {'what': 'own', 'batch_ms': 10.0, 'watch_percent': 2.5, 'watch_image_percent': 0.5}
  assert all_benchmarks.service({'rows': [served, calibrated]}).splitlines() == [
    '| what | small | own |',
    '| --- | --- | --- |',
    '| single images at saturation, images/s | 2,000 | 2,000 |',
    '| run.py, decoding and predicting the same files in batches, images/s | 2,500 | 2,500 |',
    '| share | 0.8 | 0.8 |',
    '| a batch of 64 by run.py, without decoding, ms | 8 | 10 |',
    '| its watch (`--watch`), % of that | — | 2.5 |',
    '| one image by run.py, ms | 0.75 | 0.75 |',
    '| its watch, % of that | — | 0.5 |',
    '| 99th percentile at 1,000 and 1,000 images/s, ms and batches | 20, 2.5 | 20, 2 |',
  ]
  times = {
    'cold_first_step_s': 17.3,
    'warm_first_step_s': 5.6,
    'eval_s': 7.7,
    'tpu_compile_s': None,
    'tpu_code_mb': None,
  }
  assert all_benchmarks.compile_time(times).splitlines()[2:] == [
    '| cold start to the end of the first step, s | 17.3 |',
    '| warm start, s | 5.6 |',
    '| compiling the evaluation of all exits, s | 7.7 |',
  ]


def test_accuracies_of_dtypes():
  rows = dtype_accuracy.rows({'float32': [[97.0, 98.0], [98.0, 98.0], [99.0, 98.0]], 'bfloat16': [[97.0, 98.5]] * 3})
  assert [(row['exit'], row['difference'], row['deviations']) for row in rows] == [(1, -1.0, -1.0), (2, 0.5, None)]
  assert all_benchmarks.dtype_accuracy({'rows': rows}).splitlines()[2:] == [
    '| 1 | 98.00 ± 1.00 | 97.00 ± 0.00 | -1.00 | -1.00 |',
    '| 2 | 98.00 ± 0.00 | 98.50 ± 0.00 | +0.50 |  |',
  ]


def test_one_core_is_one_core():
  assert ': 1 core of Test CPU (avx2)' in all_benchmarks.provenance(RESULT | {'machine': MACHINE | {'cores': 1}})


def test_fields_that_are_set_go_to_the_runs_of_both_dtypes(tmp_path, monkeypatch):
  given = []

  def trained(command, **_):
    given.append(command[3:-1])
    folder = Path(command[-1].removeprefix('--workdir='))
    folder.mkdir()
    (folder / 'summary.json').write_text(json.dumps({'exits': [{'accuracy': 0.5}]}))
    return SimpleNamespace(returncode=0)

  monkeypatch.setattr(dtype_accuracy.subprocess, 'run', trained)
  changes = ['model.layers_per_block=2', 'train.epochs=3']
  options = SimpleNamespace(config='configs/pn3_ddd.py', set=changes, seeds=1, workdir=tmp_path)
  assert dtype_accuracy.measure(options)['rows'][0]['bfloat16'] == [50.0]
  common = ['--config=configs/pn3_ddd.py', *(f'--config.{change}' for change in changes), '--config.seed=0']
  assert given == [[*common, f'--config.model.dtype={dtype}'] for dtype in ('float32', 'bfloat16!')]


def test_a_finished_run_of_another_configuration_is_not_read(tmp_path, monkeypatch):
  for dtype in dtype_accuracy.DTYPES:
    (tmp_path / f'{dtype}-0').mkdir()
    (tmp_path / f'{dtype}-0/summary.json').write_text(json.dumps({'exits': [{'accuracy': 0.5}]}))
  refused = SimpleNamespace(returncode=2)
  monkeypatch.setattr(dtype_accuracy.subprocess, 'run', lambda *_, **__: refused)
  options = SimpleNamespace(config='configs/pn3_ddd.py', set=[], seeds=1, workdir=tmp_path)
  with pytest.raises(UserError, match=f'expected a run in {tmp_path}/float32-0, found exit code 2; see its message'):
    dtype_accuracy.measure(options)


PROGRAMS = sorted({command[0].removesuffix('.py') for command in all_benchmarks.COMMANDS.values()})


@pytest.mark.parametrize('program', PROGRAMS)
def test_help_is_printed(program, capsys):
  with pytest.raises(SystemExit, match='0'):
    importlib.import_module(f'benchmarks.{program}').main(['--help'])
  assert '--json' in capsys.readouterr().out


def test_the_page_has_the_tables_of_the_results():
  page = all_benchmarks.PAGE.read_text()
  assert all_benchmarks.rendered(page, all_benchmarks.results()) == page


def ratios(name, what, column):
  """The speed ratios of a table in the rows that begin so."""
  rows = [line.split(' | ') for line in all_benchmarks.compared(all_benchmarks.results()[name]).splitlines()]
  return [row[column].strip(' |') for row in rows if row[0].startswith(f'| {what}')]


OVER_EAGER, OVER_FASTEST, IN_BFLOAT16 = 3, 5, 7


@pytest.mark.parametrize(
  ('quote', 'tables'),
  [
    ('is [{} times as fast](docs/speed.md)', [('train_step', 'training step, all', OVER_EAGER)]),
    ('and {} times as fast as PyTorch with bfloat16', [('train_step', 'training step, all', OVER_FASTEST)]),
    (
      'is {}, {} and {} times as fast as PyTorch at its best, and {}, {} and {} times in bfloat16',
      [('inference', 'forward pass, exit', OVER_FASTEST), ('inference', 'forward pass, exit', IN_BFLOAT16)],
    ),
    (
      'training is {} times as fast as PyTorch at its best, and the forward pass {}, {} and {} times.',
      [('train_step_avx2', 'training step, all', OVER_FASTEST), ('inference_avx2', 'forward pass, exit', OVER_FASTEST)],
    ),
  ],
)
def test_the_readme_quotes_the_tables(quote, tables):
  readme = ' '.join((all_benchmarks.ROOT / 'README.md').read_text().split())
  assert quote.format(*(ratio for table in tables for ratio in ratios(*table))) in readme


def test_one_image_takes_less_than_a_quarter_of_the_time():
  assert min(map(float, ratios('inference', 'one image, exit', OVER_FASTEST))) > 4


def test_what_is_measured(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(all_benchmarks, 'RESULTS', tmp_path / 'results')
  monkeypatch.setattr(all_benchmarks, 'PAGE', tmp_path / 'speed.md')
  (tmp_path / 'speed.md').write_text('<!-- table train_step -->\n<!-- end -->\n')
  result = RESULT | {'rows': [row('step', 'eager', 80.0, 40.0, 'images/s')]}
  monkeypatch.setattr(all_benchmarks, 'measure', lambda name, part: {'train_step': result}[name])
  assert all_benchmarks.main(['train_step']) == 0
  assert json.loads((tmp_path / 'results/train_step.json').read_text()) == result
  assert '| 80 | 40 | 2 |' in (tmp_path / 'speed.md').read_text()
  assert all_benchmarks.main(['speed']) == 2
  assert f'expected names of {", ".join(all_benchmarks.COMMANDS)}, found speed' in capsys.readouterr().err


def test_a_benchmark_that_fails(monkeypatch):
  monkeypatch.setitem(all_benchmarks.COMMANDS, 'train_step', ('all.py', 'speed'))
  with pytest.raises(UserError, match='expected python benchmarks/all.py speed to succeed, found exit code 2'):
    all_benchmarks.measure('train_step')


def test_parts_are_merged(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(all_benchmarks, 'RESULTS', tmp_path)
  monkeypatch.setattr(all_benchmarks, 'PAGE', tmp_path / 'speed.md')
  (tmp_path / 'speed.md').write_text('<!-- table deploy -->\n<!-- end -->\n')

  def measured(name, part):
    ours = {'ours': {'start_s': 3.0, 'peak_mb': 300.0, 'size_mb': 9.5}} if part[1] == '--points=start' else {}
    milliseconds = 6.0 if part[1] == '--points=exit 3' else 2.0
    rows = [{'what': part[1][9:], 'peer': 'ours', 'images_per_s': speed, 'one_image_ms': milliseconds, 'speedup': None}]
    return RESULT | {'runtimes': ours, 'rows': [] if ours else rows}

  monkeypatch.setattr(all_benchmarks, 'measure', measured)
  speed = 2500.0
  assert all_benchmarks.main(['deploy']) == 0
  speed = 2600.0
  assert all_benchmarks.main(['deploy', '--part=4']) == 0
  found = json.loads((tmp_path / 'deploy.json').read_text())
  assert [row['what'] for row in found['rows']] == [*all_benchmarks.POINTS[1:]]
  assert [row['images_per_s'] for row in found['rows']] == [2500.0, 2500.0, 2600.0, 2500.0, 2500.0, 2500.0]
  assert [row['speedup'] for row in found['rows']] == [3.0, 3.0, 1.0, 3.0, 3.0, 3.0]
  assert found['runtimes']['ours']['start_s'] == 3.0
  for field, value, what in (
    ('machine', MACHINE | {'cpu': 'Another CPU'}, 'machine'),
    ('versions', {'jax': '0.12.0'}, 'versions'),
    ('command', 'python benchmarks/deploy.py --rounds=1', 'command'),
  ):
    monkeypatch.setattr(all_benchmarks, 'measure', lambda *part, of={field: value}: measured(*part) | of)
    assert all_benchmarks.main(['deploy', '--part=4']) == 2
    message = f'expected a part that was measured as the rest of {tmp_path}/deploy.json, found another {what}; '
    assert capsys.readouterr().err == f'error: {message}measure all: all.py deploy\n'
    assert json.loads((tmp_path / 'deploy.json').read_text()) == found
  for wrong in (['deploy', '--part=8'], ['train_step', '--part=1'], ['--part=1']):
    assert all_benchmarks.main(wrong) == 2
    assert capsys.readouterr().err.startswith(
      'error: expected one benchmark and one of its parts (early_exit: 1 to 4, '
    )


def test_a_whole_benchmark_keeps_nothing_of_another_machine(tmp_path, monkeypatch):
  monkeypatch.setattr(all_benchmarks, 'RESULTS', tmp_path)
  monkeypatch.setattr(all_benchmarks, 'PAGE', tmp_path / 'speed.md')
  (tmp_path / 'speed.md').write_text('<!-- table deploy -->\n<!-- end -->\n')
  peers = ['ours', 'openvino']

  def measured(name, part):
    rows = [{'what': part[1][9:], 'peer': peer, 'images_per_s': 5.0, 'one_image_ms': 2.0} for peer in peers]
    facts = {peer: {'start_s': 3.0, 'peak_mb': 300.0, 'size_mb': 9.5} for peer in peers}
    return RESULT | ({'rows': [], 'runtimes': facts} if part[1] == '--points=start' else {'rows': rows, 'runtimes': {}})

  monkeypatch.setattr(all_benchmarks, 'measure', measured)
  assert all_benchmarks.main(['deploy']) == 0
  peers = ['ours']  # Here it is not installed.
  assert all_benchmarks.main(['deploy']) == 0
  found = json.loads((tmp_path / 'deploy.json').read_text())
  assert {row['peer'] for row in found['rows']} == set(found['runtimes']) == {'ours'}


@pytest.mark.parametrize(
  'features, refused, kind, twin',
  [
    ({'avx2', 'avx512f'}, 'inference_avx2', 'AVX2 alone', 'inference'),
    ({'asimd'}, 'dense_block_avx2', 'AVX2 alone', 'dense_block'),
    ({'avx2'}, 'train_step', 'AVX-512', 'train_step_avx2'),
  ],
)
def test_processors_with_avx2_alone_have_results_of_their_own(
  features, refused, kind, twin, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(all_benchmarks, 'RESULTS', tmp_path)
  monkeypatch.setattr(all_benchmarks, 'PAGE', tmp_path / 'speed.md')
  (tmp_path / 'speed.md').touch()
  monkeypatch.setattr(all_benchmarks, 'cpu_features', lambda: features)
  monkeypatch.setattr(all_benchmarks, 'cpu_name', lambda: 'Test CPU')
  monkeypatch.setattr(all_benchmarks, 'rendered', lambda page, found: page)
  measured = []
  monkeypatch.setattr(all_benchmarks, 'measure', lambda name, part: measured.append(name) or RESULT)
  assert all_benchmarks.main([refused]) == 2
  message = f'expected a processor with {kind} for {refused}, found Test CPU; measure {twin}'
  assert capsys.readouterr().err == f'error: {message}\n' and not measured
  assert all_benchmarks.main([twin]) == 0 and measured == [twin]
  measured.clear()
  assert all_benchmarks.main([]) == 0
  assert twin in measured and refused not in measured and {'deploy', 'service'} <= set(measured)
