"""Data sets as uint8 arrays, their splits, and batches and augmentation as pure functions."""
