"""Features of frozen parts on disk: the store, and the data sets that read images' and heads' features from it."""
