"""Guards of a run against steps that are not finite, spikes, stuck ranks, a lack of memory, and dead workers."""
