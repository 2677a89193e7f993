"""The optimisers every attack is made of, over pixels, tokens, embeddings and weights."""
