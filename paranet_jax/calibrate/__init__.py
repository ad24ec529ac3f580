"""`python -m paranet_jax.calibrate`: thresholds for a budget or a risk."""
