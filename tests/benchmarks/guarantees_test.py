"""The table of docs/guarantees.md: what the results say, and no simulation that breaks a promise too often."""

import dataclasses
import json

import pytest

from benchmarks import audit, drift, guarantees
from paranet_jax.data.dataset import stratified_indices
from paranet_jax.early.exit_plan import CheckpointId, full_network_plan, save_plan
from paranet_jax.host.errors import UserError


def test_the_table_of_the_page_is_made_from_the_results():
  found, page = json.loads(guarantees.RESULTS.read_text()), guarantees.PAGE.read_text()
  assert guarantees.with_table(page, found) == page, 'run python benchmarks/guarantees.py --table'
  assert all(row['broken'] <= guarantees.allowed(row, found['draws']) for row in found['rows'])
  assert found['draws'] >= 1000 and len(found['rows']) == 12


def test_the_table_of_changes_is_made_from_the_results():
  found, page = json.loads(drift.RESULTS.read_text()), drift.PAGE.read_text()
  assert drift.with_table(page, found) == page, 'run python benchmarks/drift.py --table'


def test_the_table_of_audits_is_made_from_the_results():
  found, page = json.loads(audit.RESULTS.read_text()), audit.PAGE.read_text()
  assert audit.with_table(page, found) == page, 'run python benchmarks/audit.py'
  for run in found.values():
    rows = run['audit']
    assert rows['clean']['cost_macs'] < rows['hardest']['cost_macs'] < rows['attack']['cost_macs'] <= rows['most_macs']


def test_an_audit_is_read_from_the_run(tmp_path):
  plan = full_network_plan(CheckpointId('', '', 0, ''), (1, 2), (10, 20))
  save_plan(tmp_path, plan)
  with pytest.raises(UserError, match='found none; run calibrate with --audit'):
    audit.of_run(tmp_path)
  found = next(iter(json.loads(audit.RESULTS.read_text()).values()))
  save_plan(tmp_path, dataclasses.replace(plan, audit=found['audit'], expected={'cost_macs': 16.0}))
  assert audit.of_run(tmp_path) == {'command': None, 'alone': 20, 'promised': 1.25, 'audit': found['audit']}


def test_the_plug_in_is_broken_more_often():
  world = guarantees.make_world()
  row = guarantees.simulate_risks(world, 'marginal', 60, seed=3)
  assert row['broken'] <= guarantees.allowed(row, 60) < row['plug_in_broken'] and row['cost'] > row['plug_in_cost']


def by_class(outputs):
  """Halves of which each class keeps one in the first: what must not be tested on."""
  kept, drawn = stratified_indices(outputs.labels, len(outputs.labels) // 2, seed=0)
  return outputs.take(kept), outputs.take(drawn)


def test_rare_classes_keep_promises_and_a_split_by_class_does_not(monkeypatch):
  world = guarantees.make_tail()
  simulations = (
    lambda: guarantees.simulate_risks(world, 'marginal', 40, seed=3),
    lambda: guarantees.simulate_rejection(world, 40, seed=3),
    lambda: guarantees.simulate_sets(world, 20, seed=3)[0],
  )
  fair = [simulate() for simulate in simulations]
  assert all(row['broken'] <= guarantees.allowed(row, 40) for row in fair)
  monkeypatch.setattr(guarantees, 'halves', by_class)
  unfair = [simulate() for simulate in simulations]
  assert all(row['broken'] > guarantees.allowed(row, 40) for row in unfair)
