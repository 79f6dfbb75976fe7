"""What a run writes and reads again: numbers in tables, files written whole, the results folder."""
