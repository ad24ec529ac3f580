"""The table of docs/guarantees.md: what the results say, and no simulation that breaks a promise too often."""

import json

from benchmarks import drift, guarantees


def test_the_table_of_the_page_is_made_from_the_results():
  found, page = json.loads(guarantees.RESULTS.read_text()), guarantees.PAGE.read_text()
  assert guarantees.with_table(page, found) == page, 'run python benchmarks/guarantees.py --table'
  assert all(row['broken'] <= guarantees.allowed(row, found['draws']) for row in found['rows'])
  assert found['draws'] >= 1000 and len(found['rows']) == 8


def test_the_table_of_changes_is_made_from_the_results():
  found, page = json.loads(drift.RESULTS.read_text()), drift.PAGE.read_text()
  assert drift.with_table(page, found) == page, 'run python benchmarks/drift.py --table'


def test_the_plug_in_is_broken_more_often():
  world = guarantees.make_world()
  row = guarantees.simulate_risks(world, 'marginal', 60, seed=3)
  assert row['broken'] <= guarantees.allowed(row, 60) < row['plug_in_broken'] and row['cost'] > row['plug_in_cost']
