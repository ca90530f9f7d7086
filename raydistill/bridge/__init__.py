"""The Bridge: a small network from the student's latent space to the teacher's (arXiv 2606.32020)."""
