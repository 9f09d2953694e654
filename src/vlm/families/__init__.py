"""Vision-language models as they exist on the Hub: whose part each parameter is, and how the models are fed."""
