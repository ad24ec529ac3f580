"""The pictures that calibration draws."""
