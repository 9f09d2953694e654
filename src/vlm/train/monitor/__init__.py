"""What a run reports while it trains: speed, operations, profiles, plots, callbacks."""
