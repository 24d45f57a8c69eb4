"""Images: where they come from, in which order, with which augmentation."""
