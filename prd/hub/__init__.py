"""Finding and sharing trained weights: folders, the Hugging Face Hub, model cards."""
