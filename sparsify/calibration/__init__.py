"""Run a model on calibration data, layer by layer."""
