"""Early-exit image classifiers in JAX: ParaNet and the tools to train, calibrate and run every exit.

`load(workdir)` gives a run's model, variables and exits (None: not calibrated); `EarlyExit.load(workdir)` predicts with
it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from paranet_jax.early.loaded_run import load
  from paranet_jax.early.runtime import EarlyExit

from paranet_jax.host.known_faults import avoid_known_faults

__version__ = '0.2.0'
__all__ = ['EarlyExit', 'load']


avoid_known_faults()  # Here, because XLA reads its flags once, whatever of this package is used first.


def __getattr__(name: str) -> Any:
  # jax takes a second to import, which the command line does not spend on a mistyped flag.
  if name == 'load':
    from paranet_jax.early.loaded_run import load

    return load
  if name == 'EarlyExit':
    from paranet_jax.early.runtime import EarlyExit

    return EarlyExit
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
