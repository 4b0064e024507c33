"""Damages compressed checkpoints in every way that comes to mind, and judges what loading makes of each."""
