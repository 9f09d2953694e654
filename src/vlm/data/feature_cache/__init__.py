"""Image features on disk: files, store, the data set that reads them."""
