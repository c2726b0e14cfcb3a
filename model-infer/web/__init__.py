"""The service that serve.py runs: endpoints, their limits, and the page."""
