"""Other libraries' SAE files: read without guessing, and written."""
