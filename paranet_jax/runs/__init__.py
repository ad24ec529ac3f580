"""A run's folder: configuration, checkpoints and what was learned from."""
