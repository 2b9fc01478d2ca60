"""From a source to a shard folder: list, plan, make each shard, merge."""
