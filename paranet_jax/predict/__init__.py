"""`python -m paranet_jax.predict`: classes of image files."""
