"""A file <-> a canonical graph: one module per format, and the front door that tells them apart by content."""
