"""From rows to claims: correlations, intervals, tests and rankings. No model, no SAE."""
