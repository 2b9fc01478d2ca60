"""What lies on disk: tar archives, the layout of a shard folder, its tables and checksums."""
