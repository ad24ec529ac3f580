"""`python -m paranet_jax.plan`: memory and time of a run before it starts."""
