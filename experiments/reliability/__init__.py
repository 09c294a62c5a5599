"""The parts of torture.py: what each does to the software, and what it finds."""
