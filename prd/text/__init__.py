"""Prompts as embeddings: CLIP and T5 encoders and how they are loaded."""
