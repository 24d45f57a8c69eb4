"""The file formats of a converted network."""
