"""What a watch's metrics are for: rules that page, boards that show; each checked against the metrics that exist."""
