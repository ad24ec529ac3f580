"""Speed, compile time and memory against PyTorch and straightforward linen: `python benchmarks/NAME.py`."""

import os

# PyTorch runs on the CPU here. Must be set before jax is imported.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
