"""The report of a run or a bundle: one HTML file that needs nothing else."""
