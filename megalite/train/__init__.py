"""The trainer and what surrounds a training step: checkpoints, FLOPs, metrics, validation, reports."""
