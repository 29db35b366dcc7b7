"""What is written of a run, and what keeps it: folder, checkpoints, resuming, signals, metrics, evaluation, pages."""
