"""The files that a converted network leaves behind, and the proof beside them."""
