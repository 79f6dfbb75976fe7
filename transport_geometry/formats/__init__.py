"""SAE files of other libraries: read without guessing, and written. One module a library."""
