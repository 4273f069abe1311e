"""Model folders: loading, conversion, truncation, packed forward passes."""
