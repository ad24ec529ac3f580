"""A calibrated run as a folder that needs neither JAX nor this package: stages, when to leave, and what runs them."""
