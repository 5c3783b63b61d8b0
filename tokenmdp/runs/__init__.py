"""One training run: its settings, directory, environments and training."""
