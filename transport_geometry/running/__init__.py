"""From a command to a results folder: the grid, its cost, training and measuring what is missing."""
