"""What a run tells about itself: FLOPs, clocks, metrics files, the progress bar, plots and profiles."""
