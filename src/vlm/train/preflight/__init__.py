"""What a run will do, told before it: memory, time, disk, data, and what would go wrong."""
