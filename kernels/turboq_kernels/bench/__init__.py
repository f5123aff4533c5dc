"""Timing of decode on the device that is here: methods, and how they are timed."""
