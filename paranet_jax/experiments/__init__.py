"""`python -m paranet_jax.experiments`: the paper's tables."""
