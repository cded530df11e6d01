"""Measurements and diagnoses beside the training: what is claimed, measured; what a run says of itself."""
