"""Measurements beside what people use today: `python -m bench [SCENARIO …]`."""
