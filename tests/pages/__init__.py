"""What the pages tell people to type, write and read: parsed out of them, checked, and run."""
