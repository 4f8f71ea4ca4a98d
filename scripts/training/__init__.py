"""Makes the demo checkpoint: corpus, vocabulary, batches, training model, measurements, export."""
