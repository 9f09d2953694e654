"""Guards of a run: steps that are not finite, spikes, ranks that are stuck, memory that ran out, workers that died."""
