"""What convert.py does, step by step."""
