"""The paper's Tables 1 and 2 and its Figure 2, run again: what they compare, our runs, and both side by side."""
