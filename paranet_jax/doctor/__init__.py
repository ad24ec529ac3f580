"""`python -m paranet_jax.doctor`: what this machine has, and whether its jax computes right numbers."""
