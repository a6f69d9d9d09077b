"""What both sides agree on: study and messages, tasks and models, schema, metrics, privacy arithmetic, seeding, errors."""
