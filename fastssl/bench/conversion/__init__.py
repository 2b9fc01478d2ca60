"""The converter beside other writers, and planning: `bench shard`, `bench plan`."""
