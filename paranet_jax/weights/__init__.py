"""Weights from PyTorch's files, read without PyTorch and without executing anything."""
