"""`python -m paranet_jax.experiments run QUEUE.toml`: a list of runs that takes longer than a sitting."""
