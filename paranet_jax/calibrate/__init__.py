"""`python -m paranet_jax.calibrate`: temperatures, and thresholds for a budget or a risk."""
