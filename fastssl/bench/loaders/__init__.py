"""Loaders, engines and views beside those of others: `bench loader`, `augment`, `fidelity`, `start`."""
