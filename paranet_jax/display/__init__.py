"""How results are reported: tables, plots, progress and metrics files."""
