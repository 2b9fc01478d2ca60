"""The commands `fastssl shard`, `split`, `verify` and `inspect`."""
