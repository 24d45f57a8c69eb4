"""Everything around the network: settings, data, the Lightning module, logging, checkpoints, evaluation."""
