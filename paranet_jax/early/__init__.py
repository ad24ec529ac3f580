"""Early exit: calibrated confidences, thresholds for a budget or a risk, and a runtime that stops early."""
