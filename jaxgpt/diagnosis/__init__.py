"""Can this machine do the job? Probes of the machine and of an experiment's place on it, each in its own process."""
