"""From files, folders and data sets on the Hub to samples."""
