"""What every trainer shares: processes, optimizers, schedules, checkpoints, loggers, meters, signals."""
