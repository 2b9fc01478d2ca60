"""What was learned: features, kNN, the linear probe, and both while training goes on."""
