"""What `frontier.py` runs and reports."""
