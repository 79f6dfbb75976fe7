"""What is measured of one SAE at one hook: a patch, its metrics, and the estimators behind them."""
