"""What `make_golden_files.py` and the test that reads its files share."""
