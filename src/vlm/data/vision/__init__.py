"""Opening images and videos."""
