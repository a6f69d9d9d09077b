"""The coordinator: strategies, aggregation, checkpoints, evaluation. It never sees a patient."""
