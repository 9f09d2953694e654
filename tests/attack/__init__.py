"""What a stranger may try, at length: `make attack`. The short form of each attack runs with the other tests."""
