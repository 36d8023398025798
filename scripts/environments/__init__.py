"""Builds the environments of what evla works beside, each in a folder of its own: `scripts/test_environments.py`."""
