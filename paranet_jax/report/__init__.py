"""How results are shown: tables, plots, progress and metrics files."""
