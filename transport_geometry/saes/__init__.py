"""Sparse autoencoders: the model, how it is trained here or finished on KL, and SAEs that exist already."""
