"""What a run is, what a command was asked, and where both come from: the command line, or a checkpoint."""
