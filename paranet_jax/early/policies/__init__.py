"""The registry of policies: ways to choose the thresholds of the exits.

A policy of this package is one file here and one entry of `_BUILT_IN`. Another package's policy is registered by
`register_policy`, or found under the entry point group `paranet_jax.policies`:

    [project.entry-points."paranet_jax.policies"]
    half = "my_package.half:POLICY"
"""

from paranet_jax.early.policies.optimal import OPTIMAL
from paranet_jax.early.policies.policy import Choice, Flag, Policy
from paranet_jax.early.policies.quota import QUOTA
from paranet_jax.early.policies.risk import CRC, LTT
from paranet_jax.early.policies.shared import SHARED
from paranet_jax.early.thresholds import Samples
from paranet_jax.host.plugins import Registry

__all__ = ['Choice', 'Flag', 'Policy', 'Samples', 'default_policy', 'find_policy', 'policies', 'register_policy']

_BUILT_IN = (OPTIMAL, QUOTA, SHARED, LTT, CRC)
POLICIES = Registry('paranet_jax.policies', 'policy', {policy.name: policy for policy in _BUILT_IN})


def register_policy(policy: Policy) -> None:
  """Adds a policy, which `calibrate --policy=NAME` then finds.

  Raises:
    ValueError: another policy has this name.
  """
  POLICIES.register(policy.name, policy)


def policies() -> tuple[Policy, ...]:
  """The policies loaded so far; if several accept a target, the first is the default."""
  return tuple(POLICIES.known.values())


find_policy = POLICIES.find
"""The policy with this name; None if there is none."""


def default_policy(target: str, score: str) -> Policy | None:
  """The first policy for this kind of target and this score; None: no policy accepts both."""
  return next((policy for policy in policies() if score in policy.scores.get(target, ())), None)
