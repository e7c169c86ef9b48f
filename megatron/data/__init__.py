"""Data: corpora, indexed datasets, a source's own order, the mixture over sources, the ledger, batches."""
