"""Gaussian paths, timestep sampling and guidance, in pure torch."""
