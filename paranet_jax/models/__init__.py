"""Networks with the multi-exit interface (see `multi_exit.py`)."""
