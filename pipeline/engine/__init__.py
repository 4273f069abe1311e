"""Scoring prompts under contexts, whoever asks: batch plans, the shared-prefix engine, the generic engine, the choice between them."""
