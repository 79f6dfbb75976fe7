"""SAE files of other libraries, one module per format; `sae_files` finds and reads all of them."""
