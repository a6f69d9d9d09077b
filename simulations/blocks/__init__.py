"""Many sites at once: their parameters stacked, trained by the same few large operations."""
