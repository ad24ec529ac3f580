"""`python -m paranet_jax.export`: bundles that run without JAX."""
