"""The registry of policies: ways to choose the thresholds of the exits.

A policy of this package is one file here and one entry of `_BUILT_IN`. Another package's policy is registered by
`register_policy`, or found under the entry point group `paranet_jax.policies`:

    [project.entry-points."paranet_jax.policies"]
    half = "my_package.half:POLICY"
"""

from paranet_jax.early.policies.optimal import OPTIMAL
from paranet_jax.early.policies.policy import Choice, Flag, Policy, Samples
from paranet_jax.early.policies.quota import QUOTA
from paranet_jax.early.policies.risk import CRC, LTT
from paranet_jax.early.policies.shared import SHARED

__all__ = ['Choice', 'Flag', 'Policy', 'Samples', 'default_policy', 'find_policy', 'policies', 'register_policy']

GROUP = 'paranet_jax.policies'
"""The entry points of other packages' policies."""

_BUILT_IN = (OPTIMAL, QUOTA, SHARED, LTT, CRC)
_POLICIES = {policy.name: policy for policy in _BUILT_IN}


def register_policy(policy: Policy) -> None:
  """Adds a policy, which `calibrate --policy=NAME` then finds.

  Raises:
    ValueError: another policy has its name.
  """
  if _POLICIES.setdefault(policy.name, policy) is not policy:
    raise ValueError(f'a policy named {policy.name} is registered already')


def policies() -> tuple[Policy, ...]:
  """All registered policies; of several that accept a target the first is the default."""
  return tuple(_POLICIES.values())


def find_policy(name: str) -> Policy | None:
  """The policy of this name, looked for among the entry points if it is not registered; None: there is none."""
  if name not in _POLICIES:
    from importlib.metadata import entry_points  # Reads the metadata of every installed package.

    for entry in entry_points(group=GROUP):
      if entry.name == name:
        register_policy(entry.load())
  return _POLICIES.get(name)


def default_policy(target: str, score: str) -> Policy | None:
  """The first policy for this kind of target and this score; None: no policy accepts both."""
  return next((policy for policy in policies() if score in policy.scores.get(target, ())), None)
