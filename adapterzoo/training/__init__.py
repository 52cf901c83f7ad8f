"""Training: what pieces need at every step, penalties, parameter groups, stages, removal of masked ranks."""
