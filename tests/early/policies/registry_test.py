"""Tests of the registry of policies."""

import pytest

from paranet_jax.early.policies import POLICIES, Policy, default_policy, find_policy, policies, register_policy
from paranet_jax.portable.run import SCORES


def test_every_built_in_policy():
  assert [policy.name for policy in policies()] == ['optimal', 'quota', 'shared', 'ltt', 'crc']
  assert all(find_policy(policy.name) is policy for policy in policies())
  defaults = {
    (target, score): default_policy(target, score) for target in ('budget', 'risk', 'threshold') for score in SCORES
  }
  names = {place: policy and policy.name for place, policy in defaults.items()}
  ranking = {'budget': 'optimal', 'risk': 'ltt', 'threshold': 'shared'}
  patience = {'budget': 'shared', 'risk': None, 'threshold': 'shared'}
  assert names == {(t, s): (patience if s == 'patience' else ranking)[t] for t, s in defaults}


def test_a_name_is_registered_once(monkeypatch):
  monkeypatch.setattr(POLICIES, 'known', dict(POLICIES.known))
  mine = Policy('mine', 'mine', {}, lambda samples, target: None)
  register_policy(mine)
  register_policy(mine)
  assert find_policy('mine') is mine
  with pytest.raises(ValueError, match="there is already a policy 'mine'"):
    register_policy(Policy('mine', 'another', {}, lambda samples, target: None))
