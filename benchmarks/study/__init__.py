"""Many runs of the pipeline, and what they say together."""
