"""Everything that is written of a run: folder, checkpoints, metrics, evaluation, pages; also resuming and signals."""
