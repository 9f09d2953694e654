"""Using a trained model: loading it, generating with it, measuring it."""
