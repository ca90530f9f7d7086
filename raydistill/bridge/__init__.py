"""The Bridge: a small network from the student's latent space to the teacher's (METHOD.md section 2)."""
