"""Text: documents wherever they lie, which of them are held out, and rows of tokens."""
