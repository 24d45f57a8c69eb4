"""Trained networks: rebuilt, run on test images, measured."""
