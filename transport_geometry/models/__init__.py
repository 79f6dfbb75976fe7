"""Language models: found, loaded, split at a hook, and twins with something planted in them."""
