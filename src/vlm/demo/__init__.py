"""The generated scenes, tiny untrained parts, and the demo that trains them."""
