"""`python -m paranet_jax.ensemble`: several runs as one classifier."""
