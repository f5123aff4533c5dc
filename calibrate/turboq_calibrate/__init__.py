"""Calibration: from a checkpoint and text to a plan and its quality table."""
