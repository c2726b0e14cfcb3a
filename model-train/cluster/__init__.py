"""Training on several nodes. Only train.py imports it, when cluster/launch.py has started it."""
