"""From samples to batches: collation, packing, samplers, batch statistics."""
