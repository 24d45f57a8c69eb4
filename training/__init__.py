"""What train.py does: its steps, the Lightning module, callbacks and loggers."""
