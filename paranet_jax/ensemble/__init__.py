"""`python -m paranet_jax.ensemble`: several finished runs as one classifier."""
