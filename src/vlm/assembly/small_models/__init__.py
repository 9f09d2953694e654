"""Small models of any architecture that transformers has: few, narrow layers of every kind that the large model has."""
