"""The study: many runs of the pipeline, planned in one file, and what they say together."""
