"""Training: students, and teachers' models that are tuned on the labels."""
