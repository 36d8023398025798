"""A stand-in for SAPIEN: what it logs of the devices it finds."""
