"""AdamW over flat buffers, gradient clipping and learning-rate schedules."""
