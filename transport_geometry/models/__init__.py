"""Language models and text: load them, split a model at a hook, and make rows of tokens."""
