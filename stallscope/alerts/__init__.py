"""Alert rules: what is exported, and the proof that it works."""
