"""Raw data to examples: sources, validation, splits, leak check, demonstrations and contexts."""
