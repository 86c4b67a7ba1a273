"""How is it kept? Atomic writes, digests, locks."""
