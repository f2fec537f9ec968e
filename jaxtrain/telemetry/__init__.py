"""Report on a run: FLOPs, clocks, metrics files, the progress bar, plots and profiles."""
