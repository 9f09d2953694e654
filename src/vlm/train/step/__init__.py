"""What happens within an optimiser step: attention, memory, compilation, the chunked loss."""
