"""What a training needs besides, to be skipped at first: lock, download, limits, checks of net.py, progress, curves."""
