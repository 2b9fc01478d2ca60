"""`fastssl bench`: images per second of loaders and of training steps, beside their peers."""
