"""Training data: prompt corpora, embeddings, shape libraries, batches."""
