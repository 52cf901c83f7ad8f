"""Pictures of a report, as matplotlib figures: one file a kind."""
