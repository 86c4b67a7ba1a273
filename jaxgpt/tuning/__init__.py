"""Which settings are best? Trials of an experiment, searched, recorded and compared."""
