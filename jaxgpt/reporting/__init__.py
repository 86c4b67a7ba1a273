"""What did it do, in pictures? Figures and pages of runs, comparisons and sweeps."""
