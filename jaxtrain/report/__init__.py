"""The report of runs: what their folders hold, as one page or as tables."""
