"""The trial of a family: what training takes for granted of it, proved on a small model before weights load."""
