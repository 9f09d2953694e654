"""Starting runs: on one machine, on several, and through schedulers. Imports the standard library only."""
