"""docs/results.md: made from results/, complete, and never older than it."""

import json
import shutil
from pathlib import Path

import pytest
from running import run_command

from paranet_jax.experiments.__main__ import main
from paranet_jax.experiments.page import results_page
from paranet_jax.experiments.queue.results import markdown

REPO = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_command_makes():
  made = results_page(REPO / 'results')
  assert (REPO / 'docs/results.md').read_text() == made, 'run python -m paranet_jax.experiments results'
  for file in (REPO / 'results').rglob('results.json'):
    found = json.loads(file.read_text())
    rows = found.get('rows') or found['experiments']['table1']['rows']
    assert all(f'{row["ours"]:.2f}' in made for row in rows)


def test_queues_show_what_their_results_say():
  for file in (REPO / 'results').rglob('results.json'):
    found = json.loads(file.read_text())
    if 'queue' in found:
      assert file.with_name('results.md').read_text() == markdown(found), f'write {file.parent} again'


@pytest.fixture
def folder(tmp_path):
  for name in ('queue-paper', 'tenth-model.layers_per_block=2'):
    target = tmp_path / 'results/deeper' / name
    target.mkdir(parents=True)
    shutil.copy(REPO / 'results' / name / 'results.json', target)
  # A folder may hold both tables.
  found = json.loads((target / 'results.json').read_text())
  experiments = found['experiments']
  experiments['table2'] = experiments['table1'] | {'title': 'Table 2: logit matching'}
  (target / 'results.json').write_text(json.dumps(found))
  return tmp_path / 'results'


def test_tables_and_queues_become_sections(folder, tmp_path):
  out = tmp_path / 'page.md'
  result = run_command(main, 'results', f'--folder={folder}', f'--out={out}')
  assert (result.code, result.out, result.err) == (0, f'written: {out}\n', '')
  lines = out.read_text().splitlines()
  assert [line for line in lines if line.startswith('#')] == [
    '# Results',
    '## Results of paper.toml',
    '## Table 1: cascading',
    '## Table 2: logit matching',
  ]
  table = 'results/deeper/tenth-model.layers_per_block=2'
  assert [line for line in lines if line.startswith('- ')] == [
    '- [Results of paper.toml](#results-of-papertoml), in `results/deeper/queue-paper`',
    f'- [Table 1: cascading](#table-1-cascading), in `{table}`',
    f'- [Table 2: logit matching](#table-2-logit-matching), in `{table}`',
  ]
  date = json.loads((folder / 'deeper/queue-paper/results.json').read_text())['date']
  assert any(line.startswith(f'Written on {date}. ') for line in lines)
  assert 'In `results/deeper/queue-paper`.' in lines
  assert lines.count('In `results/deeper/tenth-model.layers_per_block=2`.') == 2
  assert '| PN3cut-dxx | 1 | 50.39 +- 0.248 | 54.48 | 0 | 130 | 3,413,088 | 198,460 | nothing |' in lines


@pytest.mark.parametrize(('before', 'code'), [('# Results\n\nMine.\n', 2), (None, 0), ('', 0)])
def test_only_a_page_of_results_is_replaced(folder, tmp_path, before, code):
  out = tmp_path / 'page.md'
  arguments = 'results', f'--folder={folder}', f'--out={out}'
  if before is None:  # An earlier page.
    run_command(main, *arguments)
    before = out.read_text()
  out.write_text(before)
  result = run_command(main, *arguments)
  assert result.code == code
  if code:
    assert out.read_text() == before
    assert result.err == (
      f'error: expected an earlier page of results or nothing at {out}, found another file; set --out\n'
    )


def text_for_a_number(folder):
  file = folder / 'deeper/queue-paper/results.json'
  found = json.loads(file.read_text())
  found['rows'][0]['ours'] = 'many'
  file.write_text(json.dumps(found))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda folder: shutil.rmtree(folder), 'expected results.json of tables or queues below {folder}, found none; set'),
    (lambda folder: (folder / 'deeper/queue-paper/results.json').write_text('{}'), 'is not of `experiments` (KeyError'),
    (text_for_a_number, 'is not of `experiments` (ValueError'),
    (lambda folder: (folder / 'deeper/queue-paper/results.json').write_text('{'), 'write it again, or set --folder'),
    (
      lambda folder: (folder.parent / 'docs').rmdir(),
      'expected the folder {folder.parent}/docs, found none; set --out',
    ),
  ],
  ids=['none', 'another command', 'a text', 'damaged', 'no place'],
)
def test_what_is_refused(folder, change, message):
  (folder.parent / 'docs').mkdir()
  change(folder)
  result = run_command(main, 'results', f'--folder={folder}', f'--out={folder.parent}/docs/page.md')
  assert result.code == 2 and message.format(folder=folder) in result.err, result
  assert result.err.count('\n') == 1 and not (folder.parent / 'docs/page.md').exists()
