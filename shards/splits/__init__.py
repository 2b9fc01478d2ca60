"""Divide a shard folder into train, val, test and label fractions."""
