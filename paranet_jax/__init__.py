"""Early-exit image classifiers in JAX: ParaNet and the tools to train and evaluate every exit."""

__version__ = '0.1.0'
