"""Early exits for a network that PyTorch has trained: `python -m paranet_jax.adopt`."""
