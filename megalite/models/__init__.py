"""Whole models: the transformer, its named presets and its families' file formats."""
