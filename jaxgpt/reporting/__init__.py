"""What did it do, in figures? Figures and pages of runs, comparisons and sweeps."""
