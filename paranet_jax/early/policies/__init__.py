"""Ways to choose thresholds."""
