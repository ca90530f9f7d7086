"""What `from raydistill import …` gives to scripts and notebooks. It does what the commands do, with the same checks."""
