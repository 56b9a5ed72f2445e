"""What every stage shares: processes, sharding, the loop, checkpoints, metrics."""
