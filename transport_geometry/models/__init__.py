"""Language models and text: found, loaded, split at a hook, and the tokens that they are fed."""
