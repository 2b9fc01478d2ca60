"""Read a finished shard folder: random access by sample id, and the order of an epoch."""
