"""Networks with the multi-exit interface (see `paranet.py`)."""
